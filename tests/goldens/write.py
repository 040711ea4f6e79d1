"""Write the golden key names and configs of rows: `python tests/goldens/write.py [ROW...]`, all when none is named.

Do it for a new row, or after a change of names that CONTRIBUTING.md's compatibility rule allows.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from promises import HEADS

for case in HEADS:
    if not sys.argv[1:] or case.row.name in sys.argv[1:]:
        model = case.build()
        shapes = {name: list(parameter.shape) for name, parameter in model.state_dict().items()}
        golden = {"config": model.config.to_dict() | {"transformers_version": None}, "shapes": shapes}
        path = Path(__file__).parent / f"{case.row.name}_{case.head}.json"
        path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
