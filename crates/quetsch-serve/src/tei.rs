//! The REST interface of Hugging Face's text-embeddings-inference for classifiers: `/predict`, `/info`, `/health`.
//! A flat list of two strings is a pair, as there; a batch is a list of lists.

use crate::engine::{Answers, Engine, Overlong, Sequence, Served};
use crate::http::{App, json};
use crate::refusal::Refusal;
use crate::telemetry;
use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use quetsch::metrics::{softmax, top_k};
use quetsch::task::Problem;
use quetsch::tokenizer::Cut;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// An answer or a refusal in this interface's words.
pub struct Answer(pub Result<Response, Refusal>);

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let refusal = match self.0 {
            Ok(response) => return response,
            Err(refusal) => refusal,
        };
        telemetry::failed(&refusal);
        let error_type = match refusal {
            Refusal::NotReady => "Unhealthy",
            Refusal::Inference(_) => "Backend",
            Refusal::Overloaded => "Overloaded",
            Refusal::Tokenizer(_) => "Tokenizer",
            Refusal::Empty => "Empty",
            _ => "Validation",
        };
        let body = Json(json!({ "error": refusal.to_string(), "error_type": error_type }));
        let mut response = (refusal.status(), body).into_response();
        if refusal == Refusal::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// 200 when requests are welcome.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    match app.is_ready() {
        true => StatusCode::OK.into_response(),
        false => {
            let body = json!({ "error": Refusal::NotReady.to_string(), "error_type": "Unhealthy" });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

/// What is served: the first model.
pub async fn info(State(app): State<Arc<App>>) -> Answer {
    Answer(app.engine().map(|engine| Json(describe(&app, engine)).into_response()))
}

fn describe(app: &App, engine: &Engine) -> Value {
    let (model, limits) = (engine.first(), &app.config.limits);
    let labels = model.classifier.labels();
    let id2label: Map<String, Value> =
        labels.iter().enumerate().map(|(i, l)| (i.to_string(), l.clone().into())).collect();
    let label2id: Map<String, Value> = labels.iter().enumerate().map(|(i, l)| (l.clone(), i.into())).collect();
    json!({
        "model_id": model.name,
        "model_sha": null,
        "model_dtype": model.dtype,
        "served_model_name": model.name,
        "model_type": { "classifier": { "id2label": id2label, "label2id": label2id } },
        "max_concurrent_requests": limits.max_concurrent_requests,
        "max_input_length": model.classifier.max_length(),
        "max_batch_tokens": limits.max_batch_tokens,
        "max_batch_requests": null,
        "max_client_batch_size": limits.max_client_batch_size,
        "auto_truncate": app.config.auto_truncate,
        "tokenization_workers": app.config.threads,
        "version": env!("CARGO_PKG_VERSION"),
        "sha": null,
        "docker_label": null,
    })
}

#[derive(Deserialize)]
struct PredictRequest {
    inputs: Value,
    truncate: Option<bool>,
    #[serde(default)]
    truncation_direction: Direction,
    #[serde(default)]
    raw_scores: bool,
    /// Ours: only the best labels.
    top_k: Option<usize>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    #[serde(alias = "Left")]
    Left,
    #[default]
    #[serde(alias = "Right")]
    Right,
}

enum Inputs {
    One(Sequence),
    Many(Vec<Sequence>),
}

const INPUTS: &str = "inputs: expected a string, a pair of strings [string, string] or a batch of mixed strings and \
                      pairs [[string], [string, string], ...]";

fn inputs(value: Value) -> Result<Inputs, Refusal> {
    let bad = || Refusal::Shape(INPUTS.into());
    let string = |value: Value| match value {
        Value::String(text) => Ok(text),
        _ => Err(bad()),
    };
    let sequence = |list: Vec<Value>| {
        let mut texts = list.into_iter().map(string);
        match (texts.next(), texts.next(), texts.next()) {
            (Some(text), pair, None) => Ok(Sequence { text: text?, pair: pair.transpose()? }),
            _ => Err(bad()),
        }
    };
    match value {
        Value::String(text) => Ok(Inputs::One(Sequence { text, pair: None })),
        Value::Array(list) if list.first().is_some_and(Value::is_string) => sequence(list).map(Inputs::One),
        Value::Array(list) if !list.is_empty() => {
            let inner = |value| match value {
                Value::Array(list) => sequence(list),
                _ => Err(bad()),
            };
            list.into_iter().map(inner).collect::<Result<_, _>>().map(Inputs::Many)
        }
        _ => Err(bad()),
    }
}

#[derive(Serialize)]
struct Prediction<'a> {
    score: f32,
    label: &'a str,
}

/// What becomes of logits.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Function {
    Softmax,
    Sigmoid,
    None,
}

/// Labels and scores in falling order: all of them, or the first `k`.
fn predictions(mut scores: Vec<f32>, labels: &[String], function: Function, k: usize) -> Vec<Prediction<'_>> {
    let order = top_k(&scores, k);
    match function {
        Function::None => {}
        Function::Sigmoid => scores.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
        Function::Softmax => softmax(&mut scores),
    }
    order.into_iter().map(|i| Prediction { score: scores[i], label: &labels[i] }).collect()
}

/// What a model's scores are if nobody says: probabilities, of several labels and of a single output by a sigmoid;
/// numbers as they are.
fn usual(model: &Served) -> Function {
    match model.classifier.task().problem {
        Problem::Regression => Function::None,
        Problem::MultiLabel => Function::Sigmoid,
        Problem::SingleLabel if model.classifier.labels().len() == 1 => Function::Sigmoid,
        Problem::SingleLabel => Function::Softmax,
    }
}

/// `POST /predict`.
pub async fn predict(State(app): State<Arc<App>>, request: Request) -> Answer {
    Answer(async { try_predict(&app, json(&app, request).await?).await }.await)
}

async fn try_predict(app: &App, request: PredictRequest) -> Result<Response, Refusal> {
    let engine = app.engine()?;
    check_top_k(request.top_k)?;
    let overlong = match (request.truncate.unwrap_or(app.config.auto_truncate), request.truncation_direction) {
        (false, _) => Overlong::Refuse,
        (true, Direction::Left) => Overlong::Cut(Cut::Left),
        (true, Direction::Right) => Overlong::Cut(Cut::Right),
    };
    let (batch, texts) = match inputs(request.inputs)? {
        Inputs::One(text) => (false, vec![text]),
        Inputs::Many(texts) => (true, texts),
    };
    check_not_empty(&texts)?;
    let characters = texts.iter().map(Sequence::chars).sum();
    let model = engine.first();
    let answers = engine.classify(&model, texts, overlong).await?;
    let headers = headers(&answers, characters);
    let labels = model.classifier.labels();
    let k = request.top_k.unwrap_or(labels.len());
    let function = if request.raw_scores { Function::None } else { usual(&model) };
    let mut rows = answers.logits.into_iter().map(|row| predictions(row, labels, function, k));
    let body = match batch {
        true => Json(rows.collect::<Vec<_>>()).into_response(),
        false => Json(rows.next()).into_response(),
    };
    Ok((headers, body).into_response())
}

fn check_top_k(top_k: Option<usize>) -> Result<(), Refusal> {
    match top_k {
        Some(0) => Err(Refusal::Shape("top_k: expected at least 1".into())),
        _ => Ok(()),
    }
}

fn check_not_empty(texts: &[Sequence]) -> Result<(), Refusal> {
    match texts.iter().any(|t| t.text.is_empty() && t.pair.as_ref().is_none_or(String::is_empty)) {
        true => Err(Refusal::Empty),
        false => Ok(()),
    }
}

/// What Hugging Face's inference clients send to a model's own address: a pipeline's parameters stand apart, a list of
/// texts is a batch, and the answer is always a list of lists.
#[derive(Deserialize)]
struct PipelineRequest {
    inputs: PipelineInputs,
    parameters: Parameters,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "inputs: expected a string or a list of strings")]
enum PipelineInputs {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct Parameters {
    function_to_apply: Option<Function>,
    top_k: Option<usize>,
}

/// `POST /`: as `/predict`, or, with `parameters`, as a pipeline.
pub async fn root(State(app): State<Arc<App>>, request: Request) -> Answer {
    let answer = async {
        let body: Value = json(&app, request).await?;
        let shape = |e: serde_json::Error| Refusal::Shape(e.to_string());
        match body.get("parameters") {
            Some(Value::Object(_)) => pipeline(&app, serde_json::from_value(body).map_err(shape)?).await,
            _ => try_predict(&app, serde_json::from_value(body).map_err(shape)?).await,
        }
    };
    Answer(answer.await)
}

async fn pipeline(app: &App, request: PipelineRequest) -> Result<Response, Refusal> {
    let engine = app.engine()?;
    check_top_k(request.parameters.top_k)?;
    let texts = match request.inputs {
        PipelineInputs::One(text) => vec![text],
        PipelineInputs::Many(texts) => texts,
    };
    let texts: Vec<_> = texts.into_iter().map(|text| Sequence { text, pair: None }).collect();
    check_not_empty(&texts)?;
    let overlong = if app.config.auto_truncate { Overlong::Cut(Cut::Right) } else { Overlong::Refuse };
    let model = engine.first();
    let answers = engine.classify(&model, texts, overlong).await?;
    let labels = model.classifier.labels();
    let k = request.parameters.top_k.unwrap_or(labels.len());
    let function = request.parameters.function_to_apply.unwrap_or(usual(&model));
    let rows: Vec<_> = answers.logits.into_iter().map(|row| predictions(row, labels, function, k)).collect();
    Ok(Json(rows).into_response())
}

/// Where the time went, in whole milliseconds.
fn headers(answers: &Answers, characters: usize) -> HeaderMap {
    let t = &answers.timing;
    let ms = |d: Duration| HeaderValue::from(d.as_millis() as u64);
    let name = HeaderName::from_static;
    HeaderMap::from_iter([
        (name("x-compute-type"), HeaderValue::from_static("cpu")),
        (name("x-compute-time"), ms(t.total)),
        (name("x-compute-characters"), HeaderValue::from(characters)),
        (name("x-compute-tokens"), HeaderValue::from(answers.tokens)),
        (name("x-total-time"), ms(t.total)),
        (name("x-tokenization-time"), ms(t.tokenization)),
        (name("x-queue-time"), ms(t.queue)),
        (name("x-inference-time"), ms(t.inference)),
    ])
}
