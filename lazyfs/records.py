"""`NamedTuple` without `typing`, which takes 10 ms to import with all that it imports: re, enum, collections.

That is a third of a light start, so only modules that the client of a mount loads use this. Type checkers see the
original; tests compare the two.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:
    from _operator import itemgetter

    class _Record(type):
        """Makes a tuple with names of a class that has annotated fields, as typing.NamedTuple does."""

        def __new__(meta, name, bases, namespace):
            if not bases:  # NamedTuple itself
                return super().__new__(meta, name, (tuple,), {**namespace, "__slots__": ()})
            fields = tuple(namespace.get("__annotations__", ()))
            defaults = {field: namespace[field] for field in fields if field in namespace}
            properties = {field: property(itemgetter(number)) for number, field in enumerate(fields)}
            added = {"__slots__": (), "_fields": fields, "_field_defaults": defaults, "__match_args__": fields}
            return super().__new__(meta, name, bases, {**namespace, **properties, **added})

    class NamedTuple(metaclass=_Record):
        def __new__(cls, *values, **named):
            fields = cls._fields
            if len(values) == len(fields) and not named:
                return tuple.__new__(cls, values)
            given = dict(zip(fields, values, strict=False))
            record = {**cls._field_defaults, **given, **named}
            if len(values) > len(fields) or not given.keys().isdisjoint(named) or record.keys() != set(fields):
                raise TypeError(f"{cls.__name__} has the fields {', '.join(fields)}")
            return tuple.__new__(cls, map(record.__getitem__, fields))

        @classmethod
        def _make(cls, values):
            return cls(*values)

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **named):
            return type(self)(**{**self._asdict(), **named})

        def __repr__(self):
            fields = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
            return f"{type(self).__name__}({fields})"

        def __getnewargs__(self):
            return tuple(self)
