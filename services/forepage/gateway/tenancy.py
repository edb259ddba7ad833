"""What keeps tenants apart: whose prefixes a request may share, and whose sequences a page may watch.

Both are in what the worker gets, so they hold whichever gateway it came through. A tenant of None: no keys
are asked for, and everybody is one.
"""

import hashlib
import json
import secrets

TAG_CHARS, ID_CHARS = 8, 32


def salt_of(tenant: str | None, asked: str) -> str:
    """What prefixes are shared by. No two tenants have one in common, whatever they ask for."""
    return asked if tenant is None else json.dumps([tenant, asked])


def new_request_id(tenant: str | None) -> str:
    """32 random hex digits, but that those of one tenant end alike: people read how they begin."""
    tag = _tag(tenant)
    return secrets.token_hex((ID_CHARS - len(tag)) // 2) + tag


def may_watch(tenant: str | None, request_id: str) -> bool:
    """Whether a sequence is the tenant's own."""
    return request_id.endswith(_tag(tenant))


def _tag(tenant: str | None) -> str:
    return "" if tenant is None else hashlib.sha256(tenant.encode()).hexdigest()[:TAG_CHARS]
