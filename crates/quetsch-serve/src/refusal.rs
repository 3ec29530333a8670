//! Why a request is not answered, before a protocol puts it into its own words.

use axum::http::StatusCode;
use std::fmt;

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The body is not JSON.
    Syntax(String),
    /// JSON of another shape than the protocol's.
    Shape(String),
    /// The body is not said to be JSON.
    MediaType,
    /// There is no text in it.
    Empty,
    /// The body has more bytes than this server takes.
    TooLarge(String),
    /// Another limit of this server: text, batch, tokens.
    Limit(String),
    /// The text cannot be tokenised.
    Tokenizer(String),
    /// No such model.
    UnknownModel(String),
    /// The key is missing or wrong.
    Unauthorized,
    /// The client took too long to send its request.
    TooSlow,
    /// More requests than can be answered in time.
    Overloaded,
    /// Models are not loaded yet, or the server is stopping.
    NotReady,
    /// The forward failed.
    Inference(String),
}

impl Refusal {
    /// The status of the Hugging Face text-embeddings-inference server, where it has such a case.
    pub fn status(&self) -> StatusCode {
        match self {
            Refusal::Syntax(_) | Refusal::Empty => StatusCode::BAD_REQUEST,
            Refusal::Shape(_) | Refusal::Limit(_) | Refusal::Tokenizer(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Refusal::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Refusal::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Refusal::UnknownModel(_) => StatusCode::NOT_FOUND,
            Refusal::Unauthorized => StatusCode::UNAUTHORIZED,
            Refusal::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Refusal::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Refusal::NotReady => StatusCode::SERVICE_UNAVAILABLE,
            Refusal::Inference(_) => StatusCode::FAILED_DEPENDENCY,
        }
    }

    /// The status of servers that call every request they do not understand bad.
    pub fn plain_status(&self) -> StatusCode {
        match self {
            Refusal::Shape(_) | Refusal::Limit(_) | Refusal::Tokenizer(_) => StatusCode::BAD_REQUEST,
            Refusal::Inference(_) => StatusCode::INTERNAL_SERVER_ERROR,
            other => other.status(),
        }
    }

    /// The code of gRPC.
    pub fn code(&self) -> tonic::Code {
        match self {
            Refusal::Syntax(_)
            | Refusal::Shape(_)
            | Refusal::MediaType
            | Refusal::Empty
            | Refusal::TooLarge(_)
            | Refusal::Limit(_)
            | Refusal::Tokenizer(_) => tonic::Code::InvalidArgument,
            Refusal::UnknownModel(_) => tonic::Code::NotFound,
            Refusal::Unauthorized => tonic::Code::Unauthenticated,
            Refusal::TooSlow => tonic::Code::DeadlineExceeded,
            Refusal::Overloaded => tonic::Code::ResourceExhausted,
            Refusal::NotReady => tonic::Code::Unavailable,
            Refusal::Inference(_) => tonic::Code::Internal,
        }
    }

    /// The label `err` of `te_request_failure`.
    pub fn kind(&self) -> &'static str {
        match self {
            Refusal::Syntax(_) | Refusal::Shape(_) | Refusal::MediaType | Refusal::Empty => "validation",
            Refusal::TooLarge(_) | Refusal::Limit(_) => "too_large",
            Refusal::Tokenizer(_) => "tokenization",
            Refusal::UnknownModel(_) => "model",
            Refusal::Unauthorized => "unauthorized",
            Refusal::TooSlow => "timeout",
            Refusal::Overloaded => "overloaded",
            Refusal::NotReady => "unhealthy",
            Refusal::Inference(_) => "inference",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Refusal::Syntax(e) => write!(f, "the body is not JSON: {e}"),
            Refusal::Shape(e) | Refusal::TooLarge(e) => write!(f, "Input validation error: {e}"),
            Refusal::Limit(e) => f.write_str(e),
            Refusal::MediaType => f.write_str("expected `Content-Type: application/json`"),
            Refusal::Empty => f.write_str("Input validation error: `inputs` cannot be empty"),
            Refusal::Tokenizer(e) => write!(f, "Tokenization error: {e}"),
            Refusal::UnknownModel(name) => write!(f, "there is no model `{name}`"),
            Refusal::Unauthorized => f.write_str("expected `Authorization: Bearer KEY` with this server's key"),
            Refusal::TooSlow => f.write_str("the request took too long to arrive"),
            Refusal::Overloaded => f.write_str("Model is overloaded"),
            Refusal::NotReady => f.write_str("unhealthy"),
            Refusal::Inference(e) => write!(f, "Backend error: {e}"),
        }
    }
}
