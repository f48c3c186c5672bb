"""The command line. `python main.py ...` in a checkout and the installed `dmf ...` are the same.

The code is dmf/main.py, because `pip install .` installs the package dmf and nothing beside it.
"""

from dmf.main import run

if __name__ == "__main__":
    run()
