//! vLLM's `POST /classify`: a text or a list of them, or token ids; probabilities in the order of the classes.

use crate::engine::{Overlong, Sequence};
use crate::http::{App, json, new_id};
use crate::refusal::Refusal;
use crate::telemetry;
use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use quetsch::batch::Encoding;
use quetsch::metrics::argmax;
use quetsch::tokenizer::Cut;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Deserialize)]
struct ClassifyRequest {
    model: Option<String>,
    input: Input,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "input: expected a string, a list of strings, a list of token ids or a list of such lists"
)]
enum Input {
    One(String),
    Many(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

/// `POST /classify`.
pub async fn classify(State(app): State<Arc<App>>, request: Request) -> Response {
    match try_classify(&app, request).await {
        Ok(body) => Json(body).into_response(),
        Err(refusal) => {
            telemetry::failed(&refusal);
            let status = refusal.plain_status();
            let kind = match status.as_u16() {
                404 => "NotFoundError",
                429 => "RateLimitError",
                500.. => "InternalServerError",
                _ => "BadRequestError",
            };
            let message = refusal.to_string();
            let error = json!({ "message": message, "type": kind, "param": null, "code": status.as_u16() });
            (status, Json(json!({ "error": error }))).into_response()
        }
    }
}

async fn try_classify(app: &App, request: Request) -> Result<Value, Refusal> {
    let engine = app.engine()?;
    let request: ClassifyRequest = json(app, request).await?;
    let model = match &request.model {
        Some(name) => engine.model(name)?,
        None => engine.first(),
    };
    let overlong = if app.config.auto_truncate { Overlong::Cut(Cut::Right) } else { Overlong::Refuse };
    let text = |text| Sequence { text, pair: None };
    let row = |ids| Encoding { ids, types: vec![] };
    let answers = match request.input {
        Input::One(one) => engine.classify(&model, vec![text(one)], overlong).await,
        Input::Many(texts) => engine.classify(&model, texts.into_iter().map(text).collect(), overlong).await,
        Input::Ids(ids) => engine.classify_ids(&model, vec![row(ids)]).await,
        Input::ManyIds(rows) => engine.classify_ids(&model, rows.into_iter().map(row).collect()).await,
    }?;
    let (labels, problem) = (model.classifier.labels(), model.classifier.task().problem);
    let data: Vec<Value> = answers
        .logits
        .into_iter()
        .enumerate()
        .map(|(index, mut probs)| {
            let label = &labels[argmax(&probs)];
            problem.scores(&mut probs);
            json!({ "index": index, "label": label, "probs": probs, "num_classes": labels.len() })
        })
        .collect();
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Ok(json!({
        "id": format!("classify-{}", new_id()),
        "object": "list",
        "created": created,
        "model": model.name,
        "data": data,
        "usage": {
            "prompt_tokens": answers.tokens,
            "total_tokens": answers.tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": null,
        },
    }))
}
