"""A Qdrant on this machine, in memory: the requests that the knowledge base sends, and no others.

As a program it listens on the port that it is given, and requires the API key `secret-of-tests`. A field that Qdrant's
OpenAPI document does not have where it was sent is answered with status 400, as is a wrong type.
Source: docs/redoc/master/openapi.json of Qdrant 1.19; the formula of the modifier idf: lib/segment, `fancy_idf`.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from typing import Any

from aiohttp import web

KEY = "secret-of-tests"


class Invalid(Exception):
    """The request is not of the documented form."""


class Collection:
    """Points with their vectors and payload."""

    def __init__(self, size: int, words: str) -> None:
        self.size, self.words = size, words
        self.points: dict[int, dict[str, Any]] = {}
        self.indexed: set[str] = set()

    def upsert(self, point: dict[str, Any]) -> None:
        fields(point, {"id", "vector", "payload"}, {"id", "vector"})
        fields(point["vector"], {"dense", self.words})
        check(isinstance(point["id"], int) and 0 <= point["id"] < 2**64, "id")
        dense, sparse = point["vector"].get("dense"), point["vector"].get(self.words)
        check(dense is None or (len(dense) == self.size and all(isinstance(each, float) for each in dense)), "dense")
        if sparse is not None:
            check_sparse(sparse)
        self.points[point["id"]] = point

    def query(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        fields(asked, {"query", "using", "limit", "filter", "with_payload"}, {"query", "using"})
        chosen = [point for point in self.points.values() if self.matches(point, asked.get("filter") or {})]
        if asked["using"] == "dense":
            check(len(asked["query"]) == self.size, "query")
            scores = {
                point["id"]: cosine(asked["query"], point["vector"]["dense"])
                for point in chosen
                if "dense" in point["vector"]
            }
        else:
            check(asked["using"] == self.words, "using")
            check_sparse(asked["query"])
            scores = self.by_words(asked["query"], chosen)
        best = sorted(scores.items(), key=lambda pair: -pair[1])[: asked.get("limit", 10)]
        return [{"id": number, "version": 1, "score": score} for number, score in best]

    def by_words(self, asked: dict[str, Any], chosen: list[dict[str, Any]]) -> dict[int, float]:
        found: dict[int, float] = {}
        having = [point["vector"][self.words] for point in self.points.values() if self.words in point["vector"]]
        for index, value in zip(asked["indices"], asked["values"], strict=True):
            count = sum(index in each["indices"] for each in having)
            rarity = math.log(1 + (len(having) - count + 0.5) / (count + 0.5))
            for point in chosen:
                sparse = point["vector"].get(self.words, {"indices": []})
                if index in sparse["indices"]:
                    weight = sparse["values"][sparse["indices"].index(index)]
                    found[point["id"]] = found.get(point["id"], 0.0) + rarity * value * weight
        return found

    def matches(self, point: dict[str, Any], filter_: dict[str, Any]) -> bool:
        fields(filter_, {"must"})
        for condition in filter_.get("must", []):
            if "has_id" in condition:
                fields(condition, {"has_id"})
                matched = point["id"] in condition["has_id"]
            else:
                fields(condition, {"key", "match"}, {"key", "match"})
                fields(condition["match"], {"any"}, {"any"})
                check(condition["key"] in self.indexed, "not indexed")
                matched = (point.get("payload") or {}).get(condition["key"]) in condition["match"]["any"]
            if not matched:
                return False
        return True


class Qdrant:
    """The routes."""

    def __init__(self) -> None:
        self.collections: dict[str, Collection] = {}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=32 << 20, middlewares=[answered])
        app.add_routes(
            [
                web.put("/collections/{name}", self.create),
                web.get("/collections/{name}", self.info),
                web.delete("/collections/{name}", self.delete),
                web.put("/collections/{name}/index", self.index),
                web.put("/collections/{name}/points", self.upsert),
                web.get("/collections/{name}/points/{id}", self.point),
                web.post("/collections/{name}/points/delete", self.remove),
                web.post("/collections/{name}/points/query/batch", self.query),
            ]
        )
        return app

    def _one(self, request: web.Request) -> Collection:
        if (found := self.collections.get(request.match_info["name"])) is None:
            raise KeyError(f"Collection `{request.match_info['name']}` doesn't exist!")
        return found

    async def create(self, request: web.Request) -> Any:
        body = fields(await request.json(), {"vectors", "sparse_vectors"}, {"vectors"})
        fields(body["vectors"], {"dense"}, {"dense"})
        fields(body["vectors"]["dense"], {"size", "distance"}, {"size", "distance"})
        check(body["vectors"]["dense"]["distance"] == "Cosine", "distance")
        ((words, sparse),) = body["sparse_vectors"].items()
        check(fields(sparse, {"modifier"})["modifier"] == "idf", "modifier")
        check(request.match_info["name"] not in self.collections, "already exists")
        self.collections[request.match_info["name"]] = Collection(body["vectors"]["dense"]["size"], words)
        return True

    async def info(self, request: web.Request) -> Any:
        params = {"vectors": {"dense": {"size": self._one(request).size, "distance": "Cosine"}}}
        return {"status": "green", "segments_count": 1, "config": {"params": params}, "payload_schema": {}}

    async def delete(self, request: web.Request) -> Any:
        return self.collections.pop(request.match_info["name"], None) is not None

    async def index(self, request: web.Request) -> Any:
        body = fields(await request.json(), {"field_name", "field_schema"}, {"field_name"})
        check(body["field_schema"] == "keyword", "field_schema")
        self._one(request).indexed.add(body["field_name"])
        return done(request)

    async def upsert(self, request: web.Request) -> Any:
        collection = self._one(request)
        for point in fields(await request.json(), {"points"}, {"points"})["points"]:
            collection.upsert(point)
        return done(request)

    async def point(self, request: web.Request) -> Any:
        number = int(request.match_info["id"])
        if (found := self._one(request).points.get(number)) is None:
            raise KeyError(f"Point with id {number} does not exists!")
        return {"id": number, "payload": found.get("payload"), "vector": found["vector"]}

    async def remove(self, request: web.Request) -> Any:
        collection = self._one(request)
        for number in fields(await request.json(), {"points"}, {"points"})["points"]:
            check(isinstance(number, int), "points")
            collection.points.pop(number, None)
        return done(request)

    async def query(self, request: web.Request) -> Any:
        collection = self._one(request)
        searches = fields(await request.json(), {"searches"}, {"searches"})["searches"]
        return [{"points": collection.query(asked)} for asked in searches]


@web.middleware
async def answered(request: web.Request, handler: Any) -> web.StreamResponse:
    """Qdrant's frame around a result or an error."""
    if request.headers.get("api-key") != KEY:
        return web.json_response({"status": {"error": "Must provide an API key"}, "time": 0}, status=403)
    try:
        return web.json_response({"result": await handler(request), "status": "ok", "time": 0.001})
    except KeyError as exc:
        return web.json_response({"status": {"error": f"Not found: {exc.args[0]}"}, "time": 0}, status=404)
    except Invalid as exc:
        return web.json_response({"status": {"error": f"Format error: {exc}"}, "time": 0}, status=400)


def fields(value: Any, known: set[str], required: set[str] | None = None) -> Any:
    """`value`, if it is an object of these fields."""
    check(isinstance(value, dict), f"{value!r} is not an object")
    check(value.keys() <= known, f"unknown fields: {sorted(value.keys() - known)}")
    check(value.keys() >= (required or set()), f"missing fields: {sorted((required or set()) - value.keys())}")
    return value


def check(valid: bool, problem: str) -> None:
    if not valid:
        raise Invalid(problem)


def check_sparse(value: Any) -> None:
    fields(value, {"indices", "values"}, {"indices", "values"})
    indices = value["indices"]
    check(all(isinstance(each, int) and 0 <= each < 2**32 for each in indices), "indices")
    check(len(set(indices)) == len(indices) == len(value["values"]), "indices must be unique")


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / (math.sqrt(sum(a * a for a in one) * sum(b * b for b in other)) or 1.0)


def done(request: web.Request) -> dict[str, Any]:
    return {"operation_id": 1, "status": "completed" if request.query.get("wait") == "true" else "acknowledged"}


async def serve(port: int) -> None:
    runner = web.AppRunner(Qdrant().app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


class Server:
    """The program, which can be stopped and started; it forgets everything by that."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"qdrant://{KEY}@127.0.0.1:{port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Return when it accepts connections."""
        words = [sys.executable, "-I", __file__, str(self.port)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def stop(self) -> None:
        """Kill it."""
        if (process := self._process) is not None:
            self._process = None
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
