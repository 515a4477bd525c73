namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The three libraries behind the CUDA device. <see cref="Load"/> opens them; the tests' emulator
/// makes one of its own functions. Nothing else in the engine touches a native CUDA symbol.
/// </summary>
public sealed unsafe class CudaApi(CudaDriverApi driver, NvrtcApi nvrtc, CublasApi cublas)
{
    public CudaDriverApi Driver { get; } = driver;
    public NvrtcApi Nvrtc { get; } = nvrtc;
    public CublasApi Cublas { get; } = cublas;

    /// <summary>
    /// Opens the driver, asks it for a device, then opens NVRTC and cuBLAS of one major version:
    /// the newest that is there and not newer than the driver, which could not run what they make.
    /// </summary>
    /// <exception cref="CudaUnavailableException">One line: what is missing, where it was looked
    /// for.</exception>
    public static CudaApi Load(CudaSearch? search = null)
    {
        search ??= new();
        var driver = CudaDriverApi.Load(search);
        int version = Start(driver);
        var (nvrtc, cublas) = Toolkit(search, version / 1000);
        return new(driver, nvrtc, cublas);
    }

    /// <summary>Initialises the driver; returns its CUDA version (1000 * major + 10 *
    /// minor).</summary>
    /// <exception cref="CudaUnavailableException">No device, or the driver does not
    /// start.</exception>
    public static int Start(CudaDriverApi driver)
    {
        int version = 0, devices = 0;
        driver.DriverGetVersion(&version);
        string has = $"cuda: driver {driver.Path} (CUDA {version / 1000}.{version % 1000 / 10})";
        try
        {
            driver.Check(driver.Init(0), "cuInit");
            driver.Check(driver.DeviceGetCount(&devices), "cuDeviceGetCount");
        }
        catch (CudaException e)
        {
            throw new CudaUnavailableException($"{has} finds no usable device: {e.Message}");
        }
        if (devices == 0) throw new CudaUnavailableException($"{has} has no device");
        if (version < 11080)
            throw new CudaUnavailableException(
                $"{has} is too old: CUDA 11.8 or newer is needed; update the driver");
        return version;
    }

    /// <summary>NVRTC and cuBLAS of the newest major not above the driver's that has
    /// both.</summary>
    public static (NvrtcApi Nvrtc, CublasApi Cublas) Toolkit(CudaSearch search, int driverMajor)
    {
        CudaUnavailableException? first = null;
        for (int major = Math.Min(driverMajor, 13); major >= 11; major--)
        {
            try
            {
                return (NvrtcApi.Load(search, major), CublasApi.Load(search, major));
            }
            catch (CudaUnavailableException e)
            {
                first ??= e;
            }
        }
        throw first ?? new CudaUnavailableException(
            $"cuda: no toolkit for a driver of CUDA {driverMajor} is known");
    }
}
