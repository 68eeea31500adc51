"""From a StepPlan to a StepResult. Never sees a Request."""
