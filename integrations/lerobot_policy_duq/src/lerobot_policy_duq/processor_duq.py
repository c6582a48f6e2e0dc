"""The pipelines around the policy: those of an export, made anew. No step changes a number (see `modeling_duq`)."""

from __future__ import annotations

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    make_policy_processor_pipelines,
)

from .configuration_duq import DuqConfig


def make_duq_pre_post_processors(
    config: DuqConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]]:
    """dataset_stats is not read: the plan holds the statistics that the policy was trained with."""
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device or "cpu"),
    ]
    return make_policy_processor_pipelines(input_steps=before, output_steps=[DeviceProcessorStep(device="cpu")])
