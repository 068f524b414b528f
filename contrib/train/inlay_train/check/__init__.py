"""`inlay check`: the conformance kit run against an installed package, in processes of its own."""
