"""The catalog in force, and its reload: read whole, checked whole, swapped whole, or left as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from gateway.config import ConfigError, load_settings, read_catalog
from gateway.domain.catalog import Catalog
from gateway.domain.document import Problem
from gateway.domain.errors import CallerFault


class CatalogRefused(CallerFault):
    """The files on disk are no catalog; the one in force stays. `metadata["problems"]` says what is wrong where."""

    status = 422
    code = "catalog_refused"
    error_type = "unprocessable"

    def __init__(self, problems: list[Problem]) -> None:
        listed = [{"file": problem.file, "key": problem.key, "message": problem.message} for problem in problems]
        super().__init__("the catalog was refused, the one in force stays", metadata={"problems": listed})


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    revision: str
    models: int
    changed: bool
    warnings: list[Problem]


class CatalogSource:
    """Holds the catalog of one config file; `on_catalog` is told of each that replaces it."""

    def __init__(self, config: Path, catalog: Catalog) -> None:
        self.catalog = catalog
        self.on_catalog: Callable[[Catalog], None] = lambda catalog: None
        self._config = config
        self._reloading = asyncio.Lock()

    async def reload(self) -> Reloaded:
        """Read again, also which files there are. Raises CatalogRefused. Other settings keep the values of the start.

        Without any model it is refused too: files are empty while an editor writes them.
        """
        async with self._reloading:
            try:
                catalog, warnings = await asyncio.to_thread(self._read)
            except ConfigError as error:
                raise CatalogRefused(error.problems) from None
            if not catalog.models and self.catalog.models:
                raise CatalogRefused(warnings)
            changed = catalog.revision != self.catalog.revision
            self.catalog = catalog
            self.on_catalog(catalog)
            return Reloaded(revision=catalog.revision, models=len(catalog.models), changed=changed, warnings=warnings)

    def _read(self) -> tuple[Catalog, list[Problem]]:
        return read_catalog(load_settings(self._config))
