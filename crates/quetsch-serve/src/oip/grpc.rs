//! The protocol over gRPC, `inference.GRPCInferenceService`. Answers carry their tensors as the request did: typed, or
//! raw.

use super::tensor::{Data, Tensor, Values, utf8};
use super::{Described, EXTENSIONS, Infer, SERVER, VERSION};
use crate::engine::Served;
use crate::http::App;
use crate::refusal::Refusal;
use crate::telemetry;
use inference::grpc_inference_service_server::GrpcInferenceService;
use inference::infer_parameter::ParameterChoice;
use inference::model_infer_request::InferInputTensor;
use inference::model_infer_response::InferOutputTensor;
use inference::model_metadata_response::TensorMetadata;
use inference::*;
use std::sync::Arc;
use tonic::{Request, Response, Status};

pub use inference::grpc_inference_service_server::GrpcInferenceServiceServer;

#[allow(missing_docs, dead_code, clippy::all)]
mod inference {
    tonic::include_proto!("inference");
}

/// The service.
pub struct Service(pub Arc<App>);

/// A refusal as gRPC says it.
pub fn status(refusal: &Refusal) -> Status {
    telemetry::failed(refusal);
    Status::new(refusal.code(), refusal.to_string())
}

impl Service {
    fn model(&self, name: &str, version: &str) -> Result<Arc<Served>, Status> {
        super::model(&self.0, name, Some(version)).map_err(|e| status(&e))
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Answer<ServerLiveResponse> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Answer<ServerReadyResponse> {
        Ok(Response::new(ServerReadyResponse { ready: self.0.is_ready() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Answer<ModelReadyResponse> {
        let ModelReadyRequest { name, version } = request.into_inner();
        self.model(&name, &version)?;
        Ok(Response::new(ModelReadyResponse { ready: self.0.is_ready() }))
    }

    async fn server_metadata(&self, _: Request<ServerMetadataRequest>) -> Answer<ServerMetadataResponse> {
        Ok(Response::new(ServerMetadataResponse {
            name: SERVER.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: EXTENSIONS.map(str::to_owned).into(),
        }))
    }

    async fn model_metadata(&self, request: Request<ModelMetadataRequest>) -> Answer<ModelMetadataResponse> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let model = self.model(&name, &version)?;
        let tensors = |tensors: Vec<Described>| {
            let one = |(name, datatype, shape): Described| TensorMetadata {
                name: name.into(),
                datatype: datatype.into(),
                shape,
            };
            tensors.into_iter().map(one).collect()
        };
        Ok(Response::new(ModelMetadataResponse {
            name: model.name.clone(),
            versions: vec![VERSION.into()],
            platform: SERVER.into(),
            inputs: tensors(super::inputs()),
            outputs: tensors(super::outputs(&model)),
        }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Answer<ModelInferResponse> {
        let request = request.into_inner();
        let model = self.model(&request.model_name, &request.model_version)?;
        let id = request.id.clone();
        let raw = !request.raw_input_contents.is_empty();
        let request = read(request).map_err(|e| status(&e))?;
        let outputs = super::infer(&self.0, &model, request).await.map_err(|e| status(&e))?;
        let mut answer = ModelInferResponse {
            model_name: model.name.clone(),
            model_version: VERSION.into(),
            id,
            ..ModelInferResponse::default()
        };
        for o in outputs {
            let mut tensor = InferOutputTensor {
                name: o.name.into(),
                datatype: o.datatype.into(),
                shape: o.shape.map(|d| d as i64).into(),
                ..InferOutputTensor::default()
            };
            match (raw, o.values) {
                (true, values) => answer.raw_output_contents.push(values.to_bytes()),
                (false, Values::Texts(texts)) => {
                    let bytes_contents = texts.into_iter().map(String::into_bytes).collect();
                    tensor.contents = Some(InferTensorContents { bytes_contents, ..Default::default() });
                }
                (false, Values::Floats(fp32_contents)) => {
                    tensor.contents = Some(InferTensorContents { fp32_contents, ..Default::default() });
                }
            }
            answer.outputs.push(tensor);
        }
        Ok(Response::new(answer))
    }
}

fn read(request: ModelInferRequest) -> Result<Infer, Refusal> {
    let top_k = match request.parameters.get("top_k").and_then(|p| p.parameter_choice.as_ref()) {
        None => None,
        Some(ParameterChoice::Int64Param(k)) => usize::try_from(*k).ok().or(Some(0)),
        Some(ParameterChoice::Uint64Param(k)) => usize::try_from(*k).ok().or(Some(0)),
        Some(_) => return Err(Refusal::Shape("top_k: expected an integer".into())),
    };
    let raw = request.raw_input_contents;
    if !raw.is_empty() && raw.len() != request.inputs.len() {
        let (tensors, contents) = (request.inputs.len(), raw.len());
        return Err(Refusal::Shape(format!("{tensors} inputs, but {contents} raw_input_contents")));
    }
    let mut raw = raw.into_iter();
    let tensor = |t: InferInputTensor| {
        let bad = |what: &str| Refusal::Shape(format!("input `{}`: {what}", t.name));
        let shape: Option<Vec<usize>> = t.shape.iter().map(|d| usize::try_from(*d).ok()).collect();
        let shape = shape.ok_or_else(|| bad("expected a shape without negative sizes"))?;
        let data = match (raw.next(), t.contents, t.datatype.as_str()) {
            (Some(_), Some(_), _) => return Err(bad("expected either contents or raw_input_contents")),
            (Some(bytes), None, datatype) => Data::from_bytes(datatype, &bytes)?,
            (None, Some(c), "BYTES") => {
                Data::Texts(c.bytes_contents.into_iter().map(utf8).collect::<Result<_, _>>()?)
            }
            (None, Some(c), "INT32") => Data::Integers(c.int_contents.into_iter().map(i64::from).collect()),
            (None, Some(c), "INT64") => Data::Integers(c.int64_contents),
            (None, _, _) => return Err(bad("expected contents of datatype BYTES, INT64 or INT32")),
        };
        Ok(Tensor { name: t.name, datatype: t.datatype, shape, data })
    };
    let inputs = request.inputs.into_iter().map(tensor).collect::<Result<_, Refusal>>()?;
    let wanted = match request.outputs.is_empty() {
        true => None,
        false => Some(request.outputs.into_iter().map(|o| o.name).collect()),
    };
    Ok(Infer { top_k, inputs, wanted })
}
