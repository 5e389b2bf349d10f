"""From the command line to the ranks: settings are settled and checked, then processes are started."""
