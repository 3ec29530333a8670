//! `/openapi.json` against the server: its examples are answered as it says, field by field.
#![allow(clippy::unwrap_used)]

mod common;

use common::{JSON, start};
use serde_json::Value;

/// Why a value is not of a schema; the part of JSON Schema that the document uses.
fn violation(document: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    if let Some(path) = schema["$ref"].as_str() {
        let target = document.pointer(&path[1..]).unwrap_or_else(|| panic!("{path} is not there"));
        return violation(document, target, value, at);
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        let fits = choices.iter().any(|s| violation(document, s, value, at).is_none());
        return (!fits).then(|| format!("{at}: none of the choices: {value}"));
    }
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("{at}: type {other}"),
    };
    let good = match &schema["type"] {
        Value::String(kind) => is(kind),
        Value::Array(kinds) => kinds.iter().any(|k| is(k.as_str().unwrap())),
        _ => panic!("{at}: a schema without a type: {schema}"),
    };
    if !good || schema["enum"].as_array().is_some_and(|list| !list.contains(value)) {
        return Some(format!("{at}: expected {schema}, found {value}"));
    }
    if let Some(object) = value.as_object() {
        let required = schema["required"].as_array().into_iter().flatten();
        if let Some(missing) = required.map(|r| r.as_str().unwrap()).find(|r| !object.contains_key(*r)) {
            return Some(format!("{at}: {missing} is missing"));
        }
        return object.iter().find_map(|(key, value)| {
            let inner = schema["properties"].get(key).or(schema.get("additionalProperties"));
            match inner {
                Some(inner) => violation(document, inner, value, &format!("{at}.{key}")),
                None if schema.get("properties").is_some() => Some(format!("{at}: {key} is not described")),
                None => None,
            }
        });
    }
    match (value.as_array(), schema.get("items")) {
        (Some(list), Some(items)) => list.iter().find_map(|v| violation(document, items, v, &format!("{at}[]"))),
        _ => None,
    }
}

#[test]
fn the_document_tells_the_truth() {
    let server = start(|_| {});
    let document = server.get("/openapi.json").json();
    assert_eq!(document, server.get("/api-doc/openapi.json").json());
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let at = format!("{method} {path}");
            let mut url = path.clone();
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let name = format!("{{{}}}", parameter["name"].as_str().unwrap());
                url = url.replace(&name, parameter["example"].as_str().unwrap());
            }
            let content = &operation["requestBody"]["content"]["application/json"];
            if method == "post" {
                let found = violation(&document, &content["schema"], &content["example"], "example");
                assert_eq!(found, None, "{at}");
            }
            let body = content["example"].to_string();
            let body = if method == "post" { body.as_bytes() } else { b"" };
            let found = server.connect().send(&method.to_uppercase(), &url, &[JSON], body);
            assert_eq!(found.status, 200, "{at}: {}", found.body);
            let said = &operation["responses"]["200"];
            for name in said["headers"].as_object().into_iter().flat_map(|h| h.keys()) {
                assert!(found.header(name).is_some(), "{at}: {name}");
            }
            let media = found.header("content-type").unwrap_or("");
            let media = media.split(';').next().unwrap();
            match said["content"].as_object().and_then(|c| c.iter().next()) {
                None => assert_eq!(found.body, "", "{at}"),
                Some((want, content)) => {
                    assert_eq!(media, want, "{at}");
                    if media == "application/json" {
                        assert_eq!(violation(&document, &content["schema"], &found.json(), "answer"), None, "{at}");
                    }
                }
            }
            // A body that is no JSON is refused as the document says.
            if method == "post" {
                let found = server.connect().send("POST", &url, &[JSON], b"{");
                let said = &operation["responses"][found.status.to_string()]["content"]["application/json"];
                assert_eq!(found.status, 400, "{at}");
                assert_eq!(violation(&document, &said["schema"], &found.json(), "error"), None, "{at}");
            }
        }
    }
}
