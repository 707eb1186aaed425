"""python -m experiments list | run NAME [options] | report [FOLDER] | new NAME --family FAMILY"""

import sys

from experiments._machinery.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
