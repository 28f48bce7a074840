"""`python -m specdec`: the command line, where its script is not on the path."""

import sys

from specdec.cli.main import main

sys.exit(main())
