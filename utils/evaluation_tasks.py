"""The evaluation of each task type; a new one is a ``TaskView`` and a line here."""

from __future__ import annotations

from utils.evaluation import TaskView
from utils.evaluation_classes import CLASSIFICATION, MULTILABEL
from utils.evaluation_survival import SURVIVAL
from utils.evaluation_values import REGRESSION
from utils.objectives import TaskType

VIEWS: dict[TaskType, TaskView] = {
    view.task_type: view for view in (CLASSIFICATION, MULTILABEL, REGRESSION, SURVIVAL)}
