"""The POLAR reward in the shape that each trainer calls: TRL, verl, OpenRLHF."""
