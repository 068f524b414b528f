"""Methods to come, each written from the catalogue on the contract as it stands, in at most 80 lines."""
