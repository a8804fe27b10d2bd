//! imago, through its asynchronous interface. Its requests are blocking system calls inside of asynchronous functions,
//! so an executor of one thread is all that it can use.

use std::path::Path;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};

use crate::{Failure, Job, Peer};

struct Image(FormatAccess<File>);

impl Peer for Image {
    async fn open(path: &Path, direct: bool) -> Result<Self, Failure> {
        let options = StorageOpenOptions::new().filename(path).write(true).direct(direct);
        let file = File::open(options).await?;
        let image = Qcow2::<File>::builder(file).write(true).open(DenyImplicitOpenGate::default()).await?;
        Ok(Self(FormatAccess::new(image)))
    }

    async fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        Ok(self.0.read(buffer, offset).await?)
    }

    async fn write(&self, buffer: &[u8], offset: u64) -> Result<(), Failure> {
        Ok(self.0.write(buffer, offset).await?)
    }

    async fn flush(&self) -> Result<(), Failure> {
        self.0.flush().await?;
        Ok(self.0.sync().await?)
    }
}

/// Runs a job.
pub fn run(job: &Job) -> Result<(), Failure> {
    futures::executor::block_on(crate::run::<Image>(job))
}
