"""What a description cannot say of a request, put right before schemathesis sends it."""

from __future__ import annotations

import re
from typing import Any

import schemathesis

from zmqcluster.model import TASK_TYPE_PATTERN


@schemathesis.hook
def before_call(
    _: schemathesis.HookContext, case: schemathesis.Case[Any], __: dict[str, Any]
) -> None:
    """Tasks become ones that an executor takes; what does not fit the description stays wrong."""
    if not isinstance(case.body, dict | list):
        return
    body = _whole(case.body)
    tasks = body.get("tasks") if isinstance(body, dict) else body
    for each in [body, *(tasks if isinstance(tasks, list) else [])]:
        if isinstance(each, dict):
            _make_acceptable(each)
    case.body = body


def _make_acceptable(fields: dict[str, Any]) -> None:
    """Which task types there are, what they take and which jobs take more is no matter of form."""
    task_type, data, job_id = (fields.get(name) for name in ("task_type", "task_data", "job_id"))
    if isinstance(task_type, str) and re.fullmatch(TASK_TYPE_PATTERN, task_type):
        fields["task_type"] = "echo"
        if isinstance(data, dict):
            fields["task_data"] = {"value": repr(data)}
    if type(job_id) is int and 0 < job_id < 2**63:
        fields["job_id"] = 0


def _whole(value: Any) -> Any:
    """JSON Schema takes 5.0 for a whole number; we do not, which no schema can say."""
    match value:
        case dict():
            return {name: _whole(each) for name, each in value.items()}
        case list():
            return [_whole(each) for each in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value
