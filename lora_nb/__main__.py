"""`python -m lora_nb`."""

import sys

from lora_nb.cli import main

sys.exit(main())
