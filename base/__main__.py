"""`python -m embell` is the command line."""

from importlib import import_module

import_module("embell.cli.main").main()
