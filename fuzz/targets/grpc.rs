//! Messages to a server on loopback over gRPC; no status may be its own fault. The first byte of an input is the method,
//! the rest the encoded message.
#![no_main]

use bytes::{Buf, BufMut};
use libfuzzer_sys::fuzz_target;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

const METHODS: [&str; 3] = ["ModelInfer", "ModelMetadata", "ModelReady"];

/// Bytes as they are.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;
    fn encoder(&mut self) -> Raw {
        Raw
    }
    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

struct Client {
    runtime: Runtime,
    grpc: Grpc<Channel>,
}

impl Client {
    fn new() -> Client {
        let address = quetsch_fuzz::server().grpc.expect("gRPC is spoken");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a URL");
        let channel = runtime.block_on(endpoint.connect()).expect("a connection");
        let mut client = Client { runtime, grpc: Grpc::new(channel) };
        // Until the models are there the server is unavailable.
        while client.call("ModelReady", named("tiny")).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        client
    }

    fn call(&mut self, method: &str, message: Vec<u8>) -> Result<Vec<u8>, Status> {
        let path = format!("/inference.GRPCInferenceService/{method}");
        let path = PathAndQuery::from_maybe_shared(path).expect("a path");
        self.runtime.block_on(async {
            self.grpc.ready().await.expect("a connection");
            self.grpc.unary(Request::new(message), path, Raw).await.map(tonic::Response::into_inner)
        })
    }
}

static CLIENT: LazyLock<Mutex<Client>> = LazyLock::new(|| Mutex::new(Client::new()));

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let [method, message @ ..] = data else { return };
        let method = METHODS[*method as usize % METHODS.len()];
        let answer = CLIENT.lock().expect("one thread").call(method, message.to_vec());
        let Err(status) = answer else { return };
        let fault = match status.code() {
            // What gRPC prescribes for bytes that are no such message.
            Code::Internal => !status.message().starts_with("failed to decode Protobuf message"),
            // The library ends a connection after 1,024 streams that went on when they were refused.
            Code::Unknown => !format!("{status:?}").contains("too_many_internal_resets"),
            code => !matches!(code, Code::InvalidArgument | Code::NotFound),
        };
        assert!(!fault, "{method}: {status:?}");
    }
);

/// Field `number` of a message: bytes, a text or another message of fewer than 128 bytes.
fn field(number: u8, value: impl AsRef<[u8]>) -> Vec<u8> {
    let value = value.as_ref();
    [&[number << 3 | 2, value.len() as u8], value].concat()
}

/// A request that says no more than a model's name.
fn named(model: &str) -> Vec<u8> {
    field(1, model)
}

/// Requests with texts and ids, typed and raw.
fn seeds() -> Vec<Vec<u8>> {
    let tensor = |name: &str, datatype: &str, shape: &[u8], contents: Option<Vec<u8>>| {
        let contents = contents.map_or(vec![], |c| field(5, c));
        field(5, [field(1, name), field(2, datatype), field(3, shape), contents].concat())
    };
    let text = |word: &str| field(8, word);
    let raw_text = b"\x04\0\0\0card";
    let raw_ids = [2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
    let top_k = field(4, [field(1, "top_k"), field(2, b"\x10\x02")].concat());
    let output = field(6, field(1, "logits"));
    let requests = [
        vec![tensor("text", "BYTES", &[1], Some(text("my card")))],
        vec![tensor("text", "BYTES", &[2], Some([text("my card"), text("lost")].concat())), top_k.clone()],
        vec![tensor("text", "BYTES", &[1, 2], Some([text("my card"), text("lost")].concat())), output.clone()],
        vec![tensor("text", "BYTES", &[1], None), field(7, raw_text)],
        vec![tensor("input_ids", "INT64", &[1, 2], None), field(7, raw_ids)],
        vec![tensor("input_ids", "INT64", &[1, 2], Some(field(3, [2, 3]))), field(2, "1"), field(3, "id")],
        vec![tensor("input_ids", "INT32", &[1, 2], Some(field(2, [2, 3]))), top_k, output],
        vec![
            tensor("input_ids", "INT64", &[1, 2], Some(field(3, [2, 3]))),
            tensor("attention_mask", "INT64", &[1, 2], Some(field(3, [1, 1]))),
            tensor("token_type_ids", "INT64", &[1, 2], Some(field(3, [0, 1]))),
        ],
    ];
    let infer = requests
        .into_iter()
        .flat_map(|fields| ["tiny", "bert"].map(|model| [vec![0], named(model), fields.concat()].concat()));
    infer.chain([1, 2].map(|method| [vec![method], named("tiny"), field(2, "1")].concat())).collect()
}
