"""`bisect files`, the static comparison: do two files hold the same model, and if not, what happened to it?"""

from aprjax.bisect.files.compare import compare_files
from aprjax.bisect.files.report import FilesReport, TensorDifference

__all__ = ["FilesReport", "TensorDifference", "compare_files"]
