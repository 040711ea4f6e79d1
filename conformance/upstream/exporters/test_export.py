"""Not in the source distribution: export to torch.export, ONNX and ExecuTorch."""


class ExportTesterMixin:
    """No tests."""
