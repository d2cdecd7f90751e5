import sys

from fastpo.cli import main

sys.exit(main())
