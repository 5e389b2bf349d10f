"""What a run is told: every setting with its default and rule, read from YAML and the command line."""
