"""python -m experiments list | run NAME [options] | report [FOLDER]"""

import sys

from experiments._machinery.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
