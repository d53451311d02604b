"""JSON Schemas of the records that stages exchange, exported from `polarctl.records`.

`python -m polarctl.schemas` writes the `*.schema.json` files of this folder anew.
"""
