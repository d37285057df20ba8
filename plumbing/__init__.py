"""Everything that is not about diffusion: the command line, files, data sets, results. A reader need not open it."""
