//! The server's life, routes, and what all protocols share: the key, request ids, body limits.

use crate::door::{Door, Speaks, Stage};
use crate::engine::Engine;
use crate::models::Which;
use crate::oip::{grpc, rest};
use crate::refusal::Refusal;
use crate::tls::Tls;
use crate::{Config, page, tei, telemetry, vllm};
use axum::Router;
use axum::body::{Bytes, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use quetsch::Error;
use serde::de::DeserializeOwned;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tower_http::cors::CorsLayer;
use tracing::Instrument;

/// How long requests that were on their way when the server was told to stop have to come in: longer than a busy
/// machine needs to look at all its sockets.
const LAST_CALL: Duration = Duration::from_millis(200);

/// What every handler sees.
pub struct App {
    /// The settings.
    pub config: Config,
    engine: OnceLock<Engine>,
    stopping: AtomicBool,
}

impl App {
    /// The engine, once its models are loaded and warm.
    ///
    /// # Errors
    /// It is not there yet.
    pub fn engine(&self) -> Result<&Engine, Refusal> {
        self.engine.get().ok_or(Refusal::NotReady)
    }

    /// Whether new requests should be sent here.
    pub fn is_ready(&self) -> bool {
        self.engine.get().is_some() && !self.is_stopping()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// The addresses that a server listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// HTTP, or HTTPS with [`Config::tls`].
    pub http: SocketAddr,
    /// gRPC, if [`Config::grpc_port`] is set.
    pub grpc: Option<SocketAddr>,
}

/// Serves until `stop`, then answers what was accepted and returns. `listening` is told the addresses, before the
/// models are loaded. With every `reload` models and certificate are read again.
///
/// # Errors
/// As [`run`](crate::run).
pub async fn serve(
    config: Config,
    listening: impl FnOnce(Listening),
    stop: impl Future<Output = ()>,
    reload: Arc<Notify>,
) -> quetsch::Result<()> {
    config.check()?;
    let limits = config.limits;
    let mut doors = vec![];
    for (port, speaks) in [(Some(config.port), Speaks::Http), (config.grpc_port, Speaks::Grpc)] {
        let Some(port) = port else { continue };
        let tls = config.tls.as_ref().map(|files| Tls::read(files, speaks.alpn()).map(Arc::new)).transpose()?;
        doors.push(Door::open(SocketAddr::new(config.host, port), speaks, tls, limits).await?);
    }
    listening(Listening { http: doors[0].address, grpc: doors.get(1).map(|d| d.address) });

    telemetry::recorder();
    let app = Arc::new(App { config, engine: OnceLock::new(), stopping: AtomicBool::new(false) });
    let open: Vec<_> = doors.iter().map(Door::counter).collect();
    let open = || open.iter().map(|count| count()).sum::<usize>();
    let certificates: Vec<_> = doors.iter().filter_map(|d| d.tls.clone()).collect();
    let (close, closed) = watch::channel(Stage::Open);
    for door in doors {
        let router = match door.speaks {
            Speaks::Http => router(app.clone()),
            Speaks::Grpc => grpc_router(app.clone()),
        };
        tokio::spawn(door.admit(router, closed.clone()));
    }
    drop(closed);

    let mut loading = tokio::task::spawn_blocking({
        let config = app.config.clone();
        move || Engine::start(&config)
    });
    let mut upkeep = tokio::time::interval(Duration::from_secs(5));
    let mut look = app.config.reload_interval.map(tokio::time::interval);
    let mut stop = pin!(stop);
    loop {
        let which = tokio::select! {
            () = &mut stop => break,
            loaded = &mut loading, if app.engine.get().is_none() => {
                let engine = loaded.map_err(|e| Error::invalid(format!("loading the models failed: {e}")))??;
                for model in engine.models().iter() {
                    tracing::info!(model = model.name, dtype = model.dtype, "ready");
                }
                let _ = app.engine.set(engine);
                continue;
            }
            _ = upkeep.tick() => {
                telemetry::recorder().run_upkeep();
                continue;
            }
            () = reload.notified(), if app.engine.get().is_some() => Which::All,
            () = tick(&mut look), if app.engine.get().is_some() => Which::Changed,
        };
        if which == Which::All {
            certificates.iter().for_each(|c| c.reload());
        }
        let app = app.clone();
        // Not waited for: the server stops when it is told to, not when a model is loaded.
        tokio::task::spawn_blocking(move || app.engine.get().map(|engine| engine.reload(which)));
    }
    app.stopping.store(true, Ordering::Relaxed);
    let _ = close.send(Stage::LastCall);
    tracing::info!(connections = open(), "stopping");
    let drained = async {
        tokio::time::sleep(LAST_CALL.min(limits.drain_timeout / 2)).await;
        let _ = close.send(Stage::Closed);
        close.closed().await
    };
    tokio::select! {
        () = drained => Ok(()),
        () = tokio::time::sleep(limits.drain_timeout) => {
            let (left, seconds) = (open(), limits.drain_timeout.as_secs_f32());
            Err(Error::invalid(format!("stopped with {left} connections unanswered after {seconds} s")))
        }
    }
}

/// The next tick; without an interval there is none.
async fn tick(interval: &mut Option<tokio::time::Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Everybody: health, metrics, the page.
    Open,
    /// Who has the key, if there is one.
    Key,
}

/// Every route over HTTP. `openapi.json` describes the same ones; a test compares them.
fn routes() -> Vec<(&'static str, MethodRouter<Arc<App>>, Access)> {
    use Access::{Key, Open};
    vec![
        ("/", get(page::show), Open),
        ("/", post(tei::root), Key),
        ("/openapi.json", get(page::openapi), Open),
        ("/api-doc/openapi.json", get(page::openapi), Open),
        ("/health", get(tei::health), Open),
        ("/ping", get(tei::health), Open),
        ("/metrics", get(metrics), Open),
        ("/info", get(tei::info), Key),
        ("/predict", post(tei::predict), Key),
        ("/invocations", post(tei::predict), Key),
        ("/classify", post(vllm::classify), Key),
        ("/v1/classify", post(vllm::classify), Key),
        ("/v2", get(rest::server), Key),
        ("/v2/health/live", get(rest::live), Open),
        ("/v2/health/ready", get(rest::ready), Open),
        ("/v2/models/{model}", get(rest::metadata), Key),
        ("/v2/models/{model}/ready", get(rest::model_ready), Key),
        ("/v2/models/{model}/infer", post(rest::infer), Key),
        ("/v2/models/{model}/versions/{version}", get(rest::metadata), Key),
        ("/v2/models/{model}/versions/{version}/ready", get(rest::model_ready), Key),
        ("/v2/models/{model}/versions/{version}/infer", post(rest::infer), Key),
    ]
}

fn router(app: Arc<App>) -> Router {
    let (mut open, mut keyed) = (Router::new(), Router::new());
    for (path, handler, access) in routes() {
        match access {
            Access::Open => open = open.route(path, handler),
            Access::Key => keyed = keyed.route(path, handler),
        }
    }
    let keyed = keyed.route_layer(from_fn_with_state(app.clone(), check_key));
    let mut router = open.merge(keyed);
    if !app.config.cors_allow_origin.is_empty() {
        let cors = CorsLayer::new()
            .allow_methods([Method::GET, Method::POST])
            .allow_headers([header::CONTENT_TYPE, header::AUTHORIZATION])
            .allow_origin(app.config.cors_allow_origin.clone());
        router = router.layer(cors);
    }
    router.layer(from_fn_with_state(app.clone(), say_goodbye)).layer(from_fn(observe)).with_state(app)
}

/// Tells the clients of a server that stops not to send more on their connections.
async fn say_goodbye(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if app.is_stopping() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn grpc_router(app: Arc<App>) -> Router {
    let service = grpc::GrpcInferenceServiceServer::new(grpc::Service(app.clone()))
        .max_decoding_message_size(app.config.limits.payload_limit);
    let router = tonic::service::Routes::new(service).prepare().into_axum_router();
    router.layer(from_fn_with_state(app, guard_grpc)).layer(from_fn(observe))
}

async fn metrics() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], telemetry::recorder().render())
}

/// Whether a request has the key, or none is needed.
fn may(app: &App, headers: &HeaderMap) -> bool {
    let Some(key) = &app.config.api_key else { return true };
    let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    given.and_then(|g| g.strip_prefix(b"Bearer ")).is_some_and(|given| key.is(given))
}

async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match may(&app, request.headers()) {
        true => next.run(request).await,
        false => tei::Answer(Err(Refusal::Unauthorized)).into_response(),
    }
}

/// The key, and a limit to how long a call may take to come in and be answered.
async fn guard_grpc(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let open = path.ends_with("/ServerLive") || path.ends_with("/ServerReady");
    if !open && !may(&app, request.headers()) {
        return grpc::status(&Refusal::Unauthorized).into_http();
    }
    let limit = app.config.limits.body_timeout + app.config.limits.queue_timeout;
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => grpc::status(&Refusal::TooSlow).into_http(),
    }
}

/// Gives every request an id, the client's if it has a decent one, and logs it without anything the user wrote.
async fn observe(request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request.headers().get("x-request-id").filter(|id| is_decent(id)).cloned();
    let id = id.or_else(|| HeaderValue::from_str(&new_id()).ok()).unwrap_or(HeaderValue::from_static("-"));
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = || route.as_ref().map_or("-", MatchedPath::as_str);
    let method = request.method().clone();
    let span = tracing::info_span!(
        "request",
        id = id.to_str().unwrap_or("-"),
        http.request.method = %method,
        http.route = route(),
        http.response.status_code = tracing::field::Empty,
    );
    let mut response = next.run(request).instrument(span.clone()).await;
    let status = response.status();
    span.record("http.response.status_code", status.as_u16());
    tracing::info!(
        id = id.to_str().unwrap_or("-"),
        %method,
        route = route(),
        status = status.as_u16(),
        ms = start.elapsed().as_secs_f64() * 1e3,
        "request"
    );
    response.headers_mut().insert("x-request-id", id);
    if status == StatusCode::TOO_MANY_REQUESTS {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn is_decent(id: &HeaderValue) -> bool {
    let bytes = id.as_bytes();
    (1..=64).contains(&bytes.len()) && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(b))
}

/// 32 hex digits that do not repeat: a counter under a hash keyed at random when the process starts.
pub fn new_id() -> String {
    static KEYS: LazyLock<[RandomState; 2]> = LazyLock::new(|| [RandomState::new(), RandomState::new()]);
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    KEYS.iter().map(|key| format!("{:016x}", key.hash_one(n))).collect()
}

/// Reads a JSON body within the limits.
///
/// # Errors
/// It is too large, too slow, not said to be JSON, no JSON, or JSON of another shape.
pub async fn json<T: DeserializeOwned>(app: &App, request: Request) -> Result<T, Refusal> {
    if !says_json(request.headers()) {
        return Err(Refusal::MediaType);
    }
    parse(&body(app, request).await?)
}

/// JSON from bytes.
///
/// # Errors
/// It is no JSON, or JSON of another shape.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(bytes).map_err(|e| match e.is_data() {
        true => Refusal::Shape(e.to_string()),
        false => Refusal::Syntax(e.to_string()),
    })
}

/// Reads a body within the limits.
///
/// # Errors
/// It is too large, too slow, or broke off.
pub async fn body(app: &App, request: Request) -> Result<Bytes, Refusal> {
    let limit = app.config.limits.payload_limit;
    let too_large = || Refusal::TooLarge(format!("the body has more than {limit} bytes"));
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|l| l > limit) {
        return Err(too_large());
    }
    let body = to_bytes(request.into_body(), limit);
    let body = tokio::time::timeout(app.config.limits.body_timeout, body).await.map_err(|_| Refusal::TooSlow)?;
    body.map_err(|e| match e.to_string().contains("length limit") {
        true => too_large(),
        false => Refusal::Syntax("it broke off".into()),
    })
}

fn says_json(headers: &HeaderMap) -> bool {
    let given = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    let essence = given.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples in it are sent by `tests/openapi.rs`.
    #[test]
    fn every_route_is_described_and_nothing_else() {
        let document: serde_json::Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
        let paths = document["paths"].as_object().unwrap();
        let mut described: Vec<_> = paths.keys().map(String::as_str).collect();
        let mut there: Vec<_> = routes().iter().map(|(path, ..)| *path).collect();
        described.sort();
        there.sort();
        there.dedup();
        assert_eq!(described, there);
        for (path, _, access) in routes().iter().filter(|r| r.0 != "/") {
            let operation = paths[*path].as_object().unwrap().values().next().unwrap();
            let open = operation["security"].as_array().is_some_and(Vec::is_empty);
            assert_eq!(open, *access == Access::Open, "{path}");
        }
    }

    #[test]
    fn content_types() {
        let rows = [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/vnd.api+json", true),
            ("text/plain", false),
            ("application/x-www-form-urlencoded", false),
            ("", false),
        ];
        for (value, want) in rows {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(value))]);
            assert_eq!(says_json(&headers), want, "{value}");
        }
    }

    #[test]
    fn ids_of_clients_are_kept_if_they_are_harmless() {
        let rows = [("abc-1", true), ("", false), ("a b", false), ("a\u{e4}", false)];
        for (id, want) in rows {
            let value = HeaderValue::from_bytes(id.as_bytes()).unwrap();
            assert_eq!(is_decent(&value), want, "{id:?}");
        }
        assert!(is_decent(&HeaderValue::from_str(&new_id()).unwrap()));
        assert_ne!(new_id(), new_id());
    }
}
