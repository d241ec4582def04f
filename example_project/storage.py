"""Static files under hashed names, for `STORAGES["staticfiles"]` where they are served."""

from __future__ import annotations

from django.contrib.staticfiles.storage import ManifestStaticFilesStorage


class HashedModules(ManifestStaticFilesStorage):
    """Hash what modules import too: else a page mixes new modules with cached ones."""

    support_js_module_import_aggregation = True
