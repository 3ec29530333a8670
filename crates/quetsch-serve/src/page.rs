//! The page at `/` for trying a sentence, and the description of the interfaces in OpenAPI's words.

use crate::http::App;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// The page; its status is that of `/health`, because load balancers ask here too.
pub async fn show(State(app): State<Arc<App>>) -> Response {
    let status = if app.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        // Nothing from elsewhere, and nothing to elsewhere.
        (header::CONTENT_SECURITY_POLICY, include_str!("page.csp").trim_end()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (status, headers, include_str!("page.html")).into_response()
}

/// `openapi.json`.
pub async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], include_str!("openapi.json"))
}
