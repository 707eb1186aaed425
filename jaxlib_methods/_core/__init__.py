"""Mathematics and checks that more than one family uses. Families import from here, never from one another."""
