//! The Open Inference Protocol v2 over REST (KServe, Triton): health, metadata and `infer` with a BYTES tensor `text`,
//! or with INT64 tensors `input_ids` and, if rows are padded, `attention_mask`.

use crate::engine::{Answers, Overlong, Sequence, Served};
use crate::http::{App, json};
use crate::refusal::Refusal;
use crate::telemetry;
use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use quetsch::batch::Encoding;
use quetsch::metrics::{softmax, top_k};
use quetsch::tokenizer::Cut;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// The one version of every model.
const VERSION: &str = "1";
/// The size of the JSON part of a request that carries binary tensors behind it: an extension that is not here.
const BINARY: &str = "inference-header-content-length";

/// A refusal as `{"error": ".."}`.
struct Refused(Refusal);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        telemetry::failed(&self.0);
        (self.0.plain_status(), Json(json!({ "error": self.0.to_string() }))).into_response()
    }
}

/// The process answers.
pub async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

/// All models can answer.
pub async fn ready(State(app): State<Arc<App>>) -> (StatusCode, Json<Value>) {
    let ready = app.is_ready();
    (readiness(ready), Json(json!({ "ready": ready })))
}

fn readiness(ready: bool) -> StatusCode {
    if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// What this server is.
pub async fn server() -> Json<Value> {
    Json(json!({ "name": "quetsch", "version": env!("CARGO_PKG_VERSION"), "extensions": [] }))
}

/// `{model}` and, where the route has one, `{version}`.
#[derive(Deserialize)]
pub struct Name {
    model: String,
    version: Option<String>,
}

fn model<'a>(app: &'a App, name: &Name) -> Result<&'a Arc<Served>, Refusal> {
    match name.version.as_deref() {
        None | Some(VERSION) => app.engine()?.model(&name.model),
        Some(version) => Err(Refusal::UnknownModel(format!("{} version {version}", name.model))),
    }
}

/// Whether one model can answer.
pub async fn model_ready(State(app): State<Arc<App>>, Path(name): Path<Name>) -> Response {
    match model(&app, &name) {
        Ok(m) => {
            let ready = app.is_ready();
            (readiness(ready), Json(json!({ "name": m.name, "ready": ready }))).into_response()
        }
        Err(refusal) => Refused(refusal).into_response(),
    }
}

/// Tensors of one model.
pub async fn metadata(State(app): State<Arc<App>>, Path(name): Path<Name>) -> Response {
    match model(&app, &name) {
        Ok(m) => Json(describe(m)).into_response(),
        Err(refusal) => Refused(refusal).into_response(),
    }
}

fn describe(model: &Served) -> Value {
    let tensor =
        |name: &str, datatype: &str, shape: &[i64]| json!({ "name": name, "datatype": datatype, "shape": shape });
    let labels = model.classifier.labels().len() as i64;
    json!({
        "name": model.name,
        "versions": [VERSION],
        "platform": "quetsch",
        "inputs": [
            tensor("text", "BYTES", &[-1]),
            tensor("input_ids", "INT64", &[-1, -1]),
            tensor("attention_mask", "INT64", &[-1, -1]),
            tensor("token_type_ids", "INT64", &[-1, -1]),
        ],
        "outputs": [
            tensor("label", "BYTES", &[-1, -1]),
            tensor("score", "FP32", &[-1, -1]),
            tensor("logits", "FP32", &[-1, labels]),
        ],
    })
}

#[derive(Deserialize)]
struct InferRequest {
    id: Option<String>,
    #[serde(default)]
    parameters: Parameters,
    inputs: Vec<TensorIn>,
    /// Which outputs; all, if it does not say.
    outputs: Option<Vec<TensorOut>>,
}

#[derive(Default, Deserialize)]
struct Parameters {
    top_k: Option<usize>,
}

#[derive(Deserialize)]
struct TensorIn {
    name: String,
    shape: Vec<usize>,
    datatype: String,
    data: Value,
}

#[derive(Deserialize)]
struct TensorOut {
    name: String,
}

/// `POST .../infer`.
pub async fn infer(State(app): State<Arc<App>>, Path(name): Path<Name>, request: Request) -> Response {
    match try_infer(&app, &name, request).await {
        Ok(body) => Json(body).into_response(),
        Err(refusal) => Refused(refusal).into_response(),
    }
}

async fn try_infer(app: &App, name: &Name, request: Request) -> Result<Value, Refusal> {
    let engine = app.engine()?;
    let model = model(app, name)?;
    if request.headers().contains_key(BINARY) {
        return Err(Refusal::Shape(
            "binary tensor data is not supported: send JSON data (binary_data=False)".into(),
        ));
    }
    let request: InferRequest = json(app, request).await?;
    if let Some(out) = request.outputs.iter().flatten().find(|o| !OUTPUTS.contains(&o.name.as_str())) {
        return Err(Refusal::Shape(format!("there is no output `{}`; there are {}", out.name, OUTPUTS.join(", "))));
    }
    let k = match request.parameters.top_k {
        Some(0) => return Err(Refusal::Shape("top_k: expected at least 1".into())),
        k => k.unwrap_or(model.classifier.labels().len()).min(model.classifier.labels().len()),
    };
    let answers = match read(request.inputs)? {
        Inputs::Texts(texts) => {
            let overlong = if app.config.auto_truncate { Overlong::Cut(Cut::Right) } else { Overlong::Refuse };
            engine.classify(model, texts, overlong).await?
        }
        Inputs::Ids(encodings) => engine.classify_ids(model, encodings).await?,
    };
    let wanted = |name: &str| request.outputs.as_ref().is_none_or(|o| o.iter().any(|o| o.name == name));
    let mut body = json!({ "model_name": model.name, "model_version": VERSION });
    if let Some(id) = request.id {
        body["id"] = id.into();
    }
    let outputs = outputs(&answers, model, k);
    body["outputs"] = outputs.into_iter().filter(|o| o["name"].as_str().is_some_and(wanted)).collect();
    Ok(body)
}

const OUTPUTS: [&str; 3] = ["label", "score", "logits"];

fn outputs(answers: &Answers, model: &Served, k: usize) -> [Value; 3] {
    let names = model.classifier.labels();
    let n = answers.logits.len();
    let (mut labels, mut scores) = (vec![], vec![]);
    for row in &answers.logits {
        let mut probabilities = row.clone();
        softmax(&mut probabilities);
        for i in top_k(row, k) {
            labels.push(names[i].as_str());
            scores.push(probabilities[i]);
        }
    }
    let logits: Vec<f32> = answers.logits.concat();
    let [label, score, raw] = OUTPUTS;
    [
        json!({ "name": label, "shape": [n, k], "datatype": "BYTES", "data": labels }),
        json!({ "name": score, "shape": [n, k], "datatype": "FP32", "data": scores }),
        json!({ "name": raw, "shape": [n, names.len()], "datatype": "FP32", "data": logits }),
    ]
}

#[derive(Debug, PartialEq)]
enum Inputs {
    Texts(Vec<Sequence>),
    Ids(Vec<Encoding>),
}

/// The tensors of a request: `text`, or `input_ids` with what stands beside it.
fn read(tensors: Vec<TensorIn>) -> Result<Inputs, Refusal> {
    let bad = |what: String| Err(Refusal::Shape(what));
    let known = ["text", "input_ids", "attention_mask", "token_type_ids"];
    if let Some(t) = tensors.iter().find(|t| !known.contains(&t.name.as_str())) {
        return bad(format!("there is no input `{}`; there are {}", t.name, known.join(", ")));
    }
    if let Some(i) = (1..tensors.len()).find(|&i| tensors[..i].iter().any(|t| t.name == tensors[i].name)) {
        return bad(format!("input `{}` is there twice", tensors[i].name));
    }
    let find = |name: &str| tensors.iter().find(|t| t.name == name);
    match (find("text"), find("input_ids")) {
        (Some(text), None) if tensors.len() == 1 => texts(text).map(Inputs::Texts),
        (None, Some(ids)) => rows(ids, find("attention_mask"), find("token_type_ids")).map(Inputs::Ids),
        _ => bad("expected either the input `text` alone, or `input_ids`".into()),
    }
}

fn texts(tensor: &TensorIn) -> Result<Vec<Sequence>, Refusal> {
    let bad = |what: &str| Refusal::Shape(format!("input `text`: {what}"));
    if tensor.datatype != "BYTES" {
        return Err(bad("expected datatype BYTES"));
    }
    if !matches!(tensor.shape.as_slice(), [_] | [_, 1]) {
        return Err(bad("expected shape [n] or [n, 1]"));
    }
    let one = |value: &Value| match value {
        Value::String(text) => Ok(Sequence { text: text.clone(), pair: None }),
        _ => Err(bad("expected strings")),
    };
    flat(tensor)?.into_iter().map(one).collect()
}

fn rows(ids: &TensorIn, mask: Option<&TensorIn>, types: Option<&TensorIn>) -> Result<Vec<Encoding>, Refusal> {
    let bad = |t: &TensorIn, what: &str| Refusal::Shape(format!("input `{}`: {what}", t.name));
    let &[n, width] = ids.shape.as_slice() else { return Err(bad(ids, "expected shape [n, tokens]")) };
    let integers = |t: &TensorIn| -> Result<Vec<u32>, Refusal> {
        if !["INT64", "INT32"].contains(&t.datatype.as_str()) {
            return Err(bad(t, "expected datatype INT64"));
        }
        if t.shape != ids.shape {
            return Err(bad(t, "expected the shape of `input_ids`"));
        }
        let one = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        let values: Option<Vec<u32>> = flat(t)?.into_iter().map(one).collect();
        values.ok_or_else(|| bad(t, "expected integers from 0"))
    };
    let all = integers(ids)?;
    let mask = mask.map(integers).transpose()?.unwrap_or_else(|| vec![1; all.len()]);
    let types = types.map(integers).transpose()?;
    if mask.iter().any(|m| *m > 1) {
        return Err(Refusal::Shape("input `attention_mask`: expected 0 and 1".into()));
    }
    // `flat` has counted: n rows of `width` values. There is no padding here, so masked places go.
    let row = |r: usize| {
        let kept = || (r * width..(r + 1) * width).filter(|&i| mask[i] == 1);
        let ids = kept().map(|i| all[i]).collect();
        let types = types.as_ref().map(|t| kept().map(|i| t[i]).collect()).unwrap_or_default();
        Encoding { ids, types }
    };
    match all.is_empty() {
        true => Err(Refusal::Empty),
        false => Ok((0..n).map(row).collect()),
    }
}

/// The values of a tensor, flat or nested, exactly as many as its shape says.
fn flat(tensor: &TensorIn) -> Result<Vec<&Value>, Refusal> {
    fn collect<'a>(value: &'a Value, into: &mut Vec<&'a Value>) {
        match value {
            Value::Array(list) => list.iter().for_each(|v| collect(v, into)),
            value => into.push(value),
        }
    }
    let mut values = vec![];
    if tensor.data.is_array() {
        collect(&tensor.data, &mut values);
    }
    let expected = tensor.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    match expected == Some(values.len()) && tensor.data.is_array() {
        true => Ok(values),
        false => Err(Refusal::Shape(format!(
            "input `{}`: shape {:?} does not hold the {} values of data",
            tensor.name,
            tensor.shape,
            values.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(json: Value) -> Result<Inputs, Refusal> {
        let tensors: Vec<TensorIn> = json
            .as_array()
            .unwrap()
            .iter()
            .map(|t| {
                let (name, datatype) = (t[0].as_str().unwrap().to_owned(), t[1].as_str().unwrap().to_owned());
                TensorIn {
                    name,
                    datatype,
                    shape: serde_json::from_value(t[2].clone()).unwrap(),
                    data: t[3].clone(),
                }
            })
            .collect();
        read(tensors)
    }

    #[test]
    fn tensors_are_read_flat_and_nested() {
        let text = |texts: &[&str]| {
            Inputs::Texts(texts.iter().map(|t| Sequence { text: t.to_string(), pair: None }).collect())
        };
        let ids = |rows: &[(&[u32], &[u32])]| {
            Inputs::Ids(rows.iter().map(|(i, t)| Encoding { ids: i.to_vec(), types: t.to_vec() }).collect())
        };
        let rows = [
            (json!([["text", "BYTES", [2], ["a", "b"]]]), text(&["a", "b"])),
            (json!([["text", "BYTES", [2, 1], [["a"], ["b"]]]]), text(&["a", "b"])),
            (json!([["input_ids", "INT64", [2, 2], [[2, 3], [4, 5]]]]), ids(&[(&[2, 3], &[]), (&[4, 5], &[])])),
            (
                json!([
                    ["attention_mask", "INT64", [2, 2], [1, 1, 1, 0]],
                    ["input_ids", "INT64", [2, 2], [2, 3, 4, 0]],
                    ["token_type_ids", "INT64", [2, 2], [0, 1, 0, 0]]
                ]),
                ids(&[(&[2, 3], &[0, 1]), (&[4], &[0])]),
            ),
        ];
        for (json, want) in rows {
            assert_eq!(tensors(json.clone()), Ok(want), "{json}");
        }
    }

    #[test]
    fn wrong_tensors_are_refused() {
        let rows = [
            (json!([]), "either"),
            (json!([["text", "FP32", [1], ["a"]]]), "BYTES"),
            (json!([["text", "BYTES", [2], ["a"]]]), "does not hold"),
            (json!([["text", "BYTES", [1], "a"]]), "does not hold"),
            (json!([["text", "BYTES", [1, 2], ["a", "b"]]]), "expected shape"),
            (json!([["text", "BYTES", [1], [7]]]), "strings"),
            (json!([["text", "BYTES", [1], ["a"]], ["text", "BYTES", [1], ["a"]]]), "twice"),
            (json!([["text", "BYTES", [1], ["a"]], ["input_ids", "INT64", [1, 1], [2]]]), "either"),
            (json!([["words", "BYTES", [1], ["a"]]]), "no input"),
            (json!([["input_ids", "INT64", [1], [2]]]), "expected shape"),
            (json!([["input_ids", "INT64", [1, 1], [-2]]]), "integers"),
            (json!([["input_ids", "INT64", [1, 1], [1.5]]]), "integers"),
            (json!([["input_ids", "INT64", [u64::MAX, 2], [2]]]), "does not hold"),
            (json!([["input_ids", "INT64", [1000000000, 0], []]]), "cannot be empty"),
            (json!([["input_ids", "INT64", [1, 1], [2]], ["attention_mask", "INT64", [1, 1], [2]]]), "0 and 1"),
            (json!([["input_ids", "INT64", [1, 1], [2]], ["attention_mask", "INT64", [1], [1]]]), "the shape of"),
        ];
        for (json, want) in rows {
            let error = tensors(json.clone()).unwrap_err().to_string();
            assert!(error.contains(want), "{json}: {error}");
        }
    }
}
