"""JSON Schemas of the records that stages exchange, exported from `polarctl.records`."""
