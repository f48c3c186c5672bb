"""The command line. `python main.py ...` in a checkout and the installed `dmf ...` are the same.

The code is dmf/main.py, because `pip install .` installs the package dmf and nothing beside it.
"""

import sys

from dmf.run import start

if __name__ == "__main__":
    start.begin(sys.argv)  # before the long imports

    from dmf.main import run

    run()
