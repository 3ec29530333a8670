//! The protocol over REST, with its binary extension: tensors as bytes behind the JSON.

use super::tensor::{Data, Tensor, Values};
use super::{Described, EXTENSIONS, Infer, SERVER, VERSION};
use crate::http::{App, body};
use crate::refusal::Refusal;
use crate::telemetry;
use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The size of the JSON part of a body that carries tensors as bytes behind it.
const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

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
    Json(json!({ "name": SERVER, "version": env!("CARGO_PKG_VERSION"), "extensions": EXTENSIONS }))
}

/// `{model}` and, where the route has one, `{version}`.
#[derive(Deserialize)]
pub struct Name {
    model: String,
    version: Option<String>,
}

impl Name {
    fn find(&self, app: &App) -> Result<Arc<crate::engine::Served>, Refusal> {
        super::model(app, &self.model, self.version.as_deref())
    }
}

/// Whether one model can answer.
pub async fn model_ready(State(app): State<Arc<App>>, Path(name): Path<Name>) -> Response {
    match name.find(&app) {
        Ok(m) => {
            let ready = app.is_ready();
            (readiness(ready), Json(json!({ "name": m.name, "ready": ready }))).into_response()
        }
        Err(refusal) => Refused(refusal).into_response(),
    }
}

/// Tensors of one model.
pub async fn metadata(State(app): State<Arc<App>>, Path(name): Path<Name>) -> Response {
    let model = match name.find(&app) {
        Ok(model) => model,
        Err(refusal) => return Refused(refusal).into_response(),
    };
    let tensors = |tensors: Vec<Described>| -> Value {
        let one = |(name, datatype, shape)| json!({ "name": name, "datatype": datatype, "shape": shape });
        tensors.into_iter().map(one).collect()
    };
    let metadata = json!({
        "name": model.name,
        "versions": [VERSION],
        "platform": SERVER,
        "inputs": tensors(super::inputs()),
        "outputs": tensors(super::outputs(&model)),
    });
    Json(metadata).into_response()
}

#[derive(Deserialize)]
struct InferRequest {
    id: Option<String>,
    #[serde(default)]
    parameters: Parameters,
    inputs: Vec<TensorIn>,
    outputs: Option<Vec<TensorOut>>,
}

#[derive(Default, Deserialize)]
struct Parameters {
    top_k: Option<usize>,
    /// Whether outputs that do not say come as bytes.
    #[serde(default)]
    binary_data_output: bool,
}

#[derive(Deserialize)]
struct TensorIn {
    name: String,
    shape: Vec<usize>,
    datatype: String,
    data: Option<Value>,
    #[serde(default)]
    parameters: InputParameters,
}

#[derive(Default, Deserialize)]
struct InputParameters {
    binary_data_size: Option<usize>,
}

#[derive(Deserialize)]
struct TensorOut {
    name: String,
    #[serde(default)]
    parameters: OutputParameters,
}

#[derive(Default, Deserialize)]
struct OutputParameters {
    binary_data: Option<bool>,
}

/// `POST .../infer`.
pub async fn infer(State(app): State<Arc<App>>, Path(name): Path<Name>, request: Request) -> Response {
    try_infer(&app, &name, request).await.unwrap_or_else(|refusal| Refused(refusal).into_response())
}

async fn try_infer(app: &App, name: &Name, request: Request) -> Result<Response, Refusal> {
    let model = name.find(app)?;
    // Triton's client says no content type, so none is asked for.
    let json_length = request.headers().get(JSON_LENGTH).cloned();
    let body = body(app, request).await?;
    let (json, bytes) = match json_length {
        None => (&body[..], &[][..]),
        Some(length) => {
            let length = length.to_str().ok().and_then(|l| l.parse().ok());
            let parts = length.and_then(|l| body.split_at_checked(l));
            parts.ok_or_else(|| Refusal::Shape(format!("{JSON_LENGTH}: expected a number within the body")))?
        }
    };
    let request: InferRequest = crate::http::parse(json)?;
    let inputs = tensors(request.inputs, bytes)?;
    let as_bytes = |name: &str| {
        let said = request.outputs.iter().flatten().find(|o| o.name == name);
        said.and_then(|o| o.parameters.binary_data).unwrap_or(request.parameters.binary_data_output)
    };
    let wanted = request.outputs.as_ref().map(|list| list.iter().map(|o| o.name.clone()).collect());
    let outputs = super::infer(app, &model, Infer { top_k: request.parameters.top_k, inputs, wanted }).await?;

    let mut tail: Vec<u8> = vec![];
    let mut any = false;
    let mut list = Vec::with_capacity(outputs.len());
    for o in outputs {
        let mut tensor = json!({ "name": o.name, "shape": o.shape, "datatype": o.datatype });
        match (as_bytes(o.name), o.values) {
            (true, values) => {
                let bytes = values.to_bytes();
                tensor["parameters"] = json!({ "binary_data_size": bytes.len() });
                tail.extend(bytes);
                any = true;
            }
            (false, Values::Texts(texts)) => tensor["data"] = texts.into(),
            (false, Values::Floats(floats)) => tensor["data"] = floats.into(),
        }
        list.push(tensor);
    }
    let mut answer = Map::new();
    answer.insert("model_name".into(), model.name.clone().into());
    answer.insert("model_version".into(), VERSION.into());
    if let Some(id) = request.id {
        answer.insert("id".into(), id.into());
    }
    answer.insert("outputs".into(), list.into());
    if !any {
        return Ok(Json(answer).into_response());
    }
    let json = Value::Object(answer).to_string().into_bytes();
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (JSON_LENGTH, HeaderValue::from(json.len())),
    ];
    Ok((headers, [json, tail].concat()).into_response())
}

/// Inputs with their values, from JSON or from the bytes behind it.
fn tensors(inputs: Vec<TensorIn>, mut bytes: &[u8]) -> Result<Vec<Tensor>, Refusal> {
    let mut tensors = Vec::with_capacity(inputs.len());
    for t in inputs {
        let bad = |what: &str| Refusal::Shape(format!("input `{}`: {what}", t.name));
        let data = match (&t.data, t.parameters.binary_data_size) {
            (Some(json), None) => Data::from_json(json)?,
            (None, Some(size)) => {
                let parts = bytes.split_at_checked(size);
                let (own, rest) = parts.ok_or_else(|| bad("binary_data_size is beyond the end of the body"))?;
                bytes = rest;
                Data::from_bytes(&t.datatype, own)?
            }
            (Some(_), Some(_)) => return Err(bad("expected either data or binary_data_size")),
            (None, None) => return Err(bad("expected data")),
        };
        tensors.push(Tensor { name: t.name, datatype: t.datatype, shape: t.shape, data });
    }
    match bytes.is_empty() {
        true => Ok(tensors),
        false => Err(Refusal::Shape(format!("{} bytes behind the JSON belong to no input", bytes.len()))),
    }
}
