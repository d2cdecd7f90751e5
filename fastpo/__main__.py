from fastpo.cli import entry

entry()
