"""`python -m worldmodel COMMAND`; `--help` lists the commands."""

import sys

from worldmodel.cli import main

sys.exit(main())
