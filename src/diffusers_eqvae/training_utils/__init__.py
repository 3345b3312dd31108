"""What the scripts are made of: the command line, the bookkeeping of a run, and what each builds and saves."""
