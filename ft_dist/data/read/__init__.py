"""Files, tables and hub data sets to samples; needs neither torch nor numpy."""
