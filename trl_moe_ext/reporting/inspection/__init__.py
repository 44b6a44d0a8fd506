"""What a model is made of and what moe_lora would train of it, read from its modules on the meta device.

inspection = inspect_model(model, r=16)
Console().print(inspection_view(inspection))
"""

from trl_moe_ext.reporting.inspection.model import Inspection, inspect_model
from trl_moe_ext.reporting.inspection.view import inspection_view

__all__ = ["Inspection", "inspect_model", "inspection_view"]
