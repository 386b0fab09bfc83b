"""``python -m hywu_export.cli``."""

from hywu_export.cli import main

main()
