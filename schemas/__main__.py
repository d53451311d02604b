"""Write every schema into this folder: `python -m polarctl.schemas`."""

import json
from pathlib import Path

from polarctl.records import KINDS
from polarctl.schemas.export import json_schema

for kind in KINDS:
    text = json.dumps(json_schema(kind), indent=2, ensure_ascii=False)
    Path(__file__).with_name(f"{kind}.schema.json").write_text(f"{text}\n", encoding="utf-8")
