"""One file per command of `fastvar`. Heavy imports stay inside the functions, so that --help is quick."""
