//! Connections, routes, and what all protocols share: the key, request ids, body limits.

use crate::engine::Engine;
use crate::refusal::Refusal;
use crate::{Config, oip, tei, telemetry, vllm};
use axum::Router;
use axum::body::to_bytes;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use quetsch::Error;
use serde::de::DeserializeOwned;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

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
        self.engine.get().is_some() && !self.stopping.load(Ordering::Relaxed)
    }
}

/// Serves until `stop`, then answers what was accepted and returns. `listening` is told the address, before the models
/// are loaded.
///
/// # Errors
/// As [`run`](crate::run).
pub async fn serve(
    config: Config,
    listening: impl FnOnce(SocketAddr),
    stop: impl Future<Output = ()>,
) -> quetsch::Result<()> {
    config.check()?;
    let limits = config.limits;
    let address = SocketAddr::new(config.host, config.port);
    let bound = |e| Error::invalid(format!("cannot listen on {address}: {e}; choose another with --port"));
    let listener = TcpListener::bind(address).await.map_err(bound)?;
    listening(listener.local_addr().map_err(bound)?);

    telemetry::recorder();
    let app = Arc::new(App { config, engine: OnceLock::new(), stopping: AtomicBool::new(false) });
    let router = router(app.clone());
    let mut loading = tokio::task::spawn_blocking({
        let config = app.config.clone();
        move || Engine::start(&config)
    });
    let mut upkeep = tokio::time::interval(Duration::from_secs(5));
    let connections = Arc::new(Semaphore::new(limits.max_connections));
    let graceful = GracefulShutdown::new();
    let mut stop = pin!(stop);
    loop {
        let accept = async {
            let permit = connections.clone().acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            () = &mut stop => break,
            loaded = &mut loading, if app.engine.get().is_none() => {
                let engine = loaded.map_err(|e| Error::invalid(format!("loading the models failed: {e}")))??;
                for model in engine.models() {
                    tracing::info!(model = model.name, dtype = model.dtype, "ready");
                }
                let _ = app.engine.set(engine);
                continue;
            }
            _ = upkeep.tick() => {
                telemetry::recorder().run_upkeep();
                continue;
            }
            accepted = accept => accepted,
        };
        let Ok((stream, _)) = accepted else {
            // Out of file descriptors, say: others will end soon.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            let _ = connection.await; // a client that broke off is no news
            drop(permit);
        });
    }
    app.stopping.store(true, Ordering::Relaxed);
    drop(listener);
    let open = limits.max_connections - connections.available_permits();
    tracing::info!(connections = open, "stopping");
    tokio::select! {
        () = graceful.shutdown() => Ok(()),
        () = tokio::time::sleep(limits.drain_timeout) => {
            let left = limits.max_connections - connections.available_permits();
            let seconds = limits.drain_timeout.as_secs_f32();
            Err(Error::invalid(format!("stopped with {left} connections unanswered after {seconds} s")))
        }
    }
}

fn router(app: Arc<App>) -> Router {
    let open = Router::new()
        .route("/health", get(tei::health))
        .route("/ping", get(tei::health))
        .route("/metrics", get(metrics))
        .route("/v2/health/live", get(oip::live))
        .route("/v2/health/ready", get(oip::ready));
    let model = |path: &str| format!("/v2/models/{{model}}{path}");
    let version = |path: &str| format!("/v2/models/{{model}}/versions/{{version}}{path}");
    let mut keyed = Router::new()
        .route("/predict", post(tei::predict))
        .route("/info", get(tei::info))
        .route("/classify", post(vllm::classify))
        .route("/v1/classify", post(vllm::classify))
        .route("/v2", get(oip::server));
    for path in [&model as &dyn Fn(&str) -> String, &version] {
        keyed = keyed
            .route(&path(""), get(oip::metadata))
            .route(&path("/ready"), get(oip::model_ready))
            .route(&path("/infer"), post(oip::infer));
    }
    let keyed = keyed.route_layer(from_fn_with_state(app.clone(), check_key));
    open.merge(keyed).layer(from_fn(observe)).with_state(app)
}

async fn metrics() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], telemetry::recorder().render())
}

async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Some(key) = &app.config.api_key else { return next.run(request).await };
    let given = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    match given.and_then(|g| g.strip_prefix(b"Bearer ")) {
        Some(given) if key.is(given) => next.run(request).await,
        _ => tei::Answer(Err(Refusal::Unauthorized)).into_response(),
    }
}

/// Gives every request an id, the client's if it has a decent one, and logs it without anything the user wrote.
async fn observe(request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request.headers().get("x-request-id").filter(|id| is_decent(id)).cloned();
    let id = id.or_else(|| HeaderValue::from_str(&new_id()).ok()).unwrap_or(HeaderValue::from_static("-"));
    let route = request.extensions().get::<MatchedPath>().map(|p| p.as_str().to_owned());
    let method = request.method().clone();
    let mut response = next.run(request).await;
    tracing::info!(
        id = id.to_str().unwrap_or("-"),
        %method,
        route = route.as_deref().unwrap_or("-"),
        status = response.status().as_u16(),
        ms = start.elapsed().as_secs_f64() * 1e3,
        "request"
    );
    response.headers_mut().insert("x-request-id", id);
    if response.status() == StatusCode::TOO_MANY_REQUESTS {
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
    let limit = app.config.limits.payload_limit;
    let too_large = || Refusal::TooLarge(format!("the body has more than {limit} bytes"));
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|l| l > limit) {
        return Err(too_large());
    }
    let body = to_bytes(request.into_body(), limit);
    let body = tokio::time::timeout(app.config.limits.body_timeout, body).await.map_err(|_| Refusal::TooSlow)?;
    let body = body.map_err(|e| match e.to_string().contains("length limit") {
        true => too_large(),
        false => Refusal::Syntax("it broke off".into()),
    })?;
    serde_json::from_slice(&body).map_err(|e| match e.is_data() {
        true => Refusal::Shape(e.to_string()),
        false => Refusal::Syntax(e.to_string()),
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
