//! qcow2-rs: with its blocking transfers where one request is under way at a time, on tokio-uring otherwise.

use std::path::Path;

use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::ops::Qcow2IoOps;
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::uring::Qcow2IoUring;
use qcow2_rs::utils::{qcow2_alloc_dev_sync, qcow2_setup_dev_uring};

use crate::{Failure, Job, Peer};

/// Metadata is written in blocks of so many bits.
const BLOCK_BITS: u8 = 12;

fn params(direct: bool) -> Qcow2DevParams {
    Qcow2DevParams::new(BLOCK_BITS, None, None, false, direct)
}

fn failure(error: qcow2_rs::error::Qcow2Error) -> Failure {
    format!("{error:?}").into()
}

async fn read<T: Qcow2IoOps>(image: &Qcow2Dev<T>, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
    let wanted = buffer.len();
    match image.read_at(buffer, offset).await.map_err(failure)? {
        n if n == wanted => Ok(()),
        n => Err(format!("{n} bytes at {offset:#x} instead of {wanted}").into()),
    }
}

async fn flush<T: Qcow2IoOps>(image: &Qcow2Dev<T>) -> Result<(), Failure> {
    image.flush_meta().await.map_err(failure)?;
    image.fsync_range(0, usize::MAX).await.map_err(failure)
}

struct Blocking(Qcow2Dev<Qcow2IoSync>);

impl Peer for Blocking {
    async fn open(path: &Path, direct: bool) -> Result<Self, Failure> {
        let params = params(direct);
        let io = Qcow2IoSync::new(path, false, direct);
        let (image, _) = qcow2_alloc_dev_sync(path, io, &params).map_err(failure)?;
        image.qcow2_prep_io().await.map_err(failure)?;
        Ok(Self(image))
    }

    async fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        read(&self.0, buffer, offset).await
    }

    async fn write(&self, buffer: &[u8], offset: u64) -> Result<(), Failure> {
        self.0.write_at(buffer, offset).await.map_err(failure)
    }

    async fn flush(&self) -> Result<(), Failure> {
        flush(&self.0).await
    }
}

struct Ring(Qcow2Dev<Qcow2IoUring>);

impl Peer for Ring {
    async fn open(path: &Path, direct: bool) -> Result<Self, Failure> {
        Ok(Self(qcow2_setup_dev_uring(path, &params(direct)).await.map_err(failure)?))
    }

    async fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        read(&self.0, buffer, offset).await
    }

    async fn write(&self, buffer: &[u8], offset: u64) -> Result<(), Failure> {
        self.0.write_at(buffer, offset).await.map_err(failure)
    }

    async fn flush(&self) -> Result<(), Failure> {
        flush(&self.0).await
    }
}

/// Runs a job.
pub fn run(job: &Job) -> Result<(), Failure> {
    if job.depth > 1 {
        tokio_uring::start(crate::run::<Ring>(job))
    } else {
        futures::executor::block_on(crate::run::<Blocking>(job))
    }
}
