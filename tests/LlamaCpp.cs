using System.Reflection;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using LLama;
using LLama.Common;
using LLama.Native;
using MiniCpmNative.Engine.Data.Images;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The real llama.cpp, of the package LLamaSharp.Backend.Cpu: another reader of what is exported.
/// </summary>
internal sealed unsafe class LlamaCpp : IDisposable
{
    private static readonly Lazy<nint> s_pictures = new(Load);

    private readonly LLamaWeights _weights;
    private readonly LLamaContext _context;
    private readonly LLamaBatch _batch = new();
    private int _position;

    /// <summary>Opens a language model; ends the test where the library has no build.</summary>
    public LlamaCpp(string path)
    {
        _ = s_pictures.Value;
        var parameters = new ModelParams(path)
        {
            ContextSize = 512,
            BatchSize = 512,
            GpuLayerCount = 0,
            Threads = 1,
            BatchThreads = 1,
            FlashAttention = false,
            TypeK = GGMLType.GGML_TYPE_F32,
            TypeV = GGMLType.GGML_TYPE_F32,
        };
        _weights = LLamaWeights.LoadFromFile(parameters);
        _context = _weights.CreateContext(parameters);
    }

    public int[] Tokenize(string text) =>
        [.. _context.Tokenize(text, addBos: true, special: true).Select(token => (int)token)];

    /// <summary>Logits after these tokens, which follow those of earlier calls.</summary>
    public float[] Logits(ReadOnlySpan<int> tokens)
    {
        _batch.Clear();
        for (int i = 0; i < tokens.Length; i++)
            _batch.Add(tokens[i], _position++, LLamaSeqId.Zero, i == tokens.Length - 1);
        Assert.That(_context.NativeHandle.Decode(_batch), Is.EqualTo(DecodeResult.Ok));
        return _context.NativeHandle.GetLogitsIth(tokens.Length - 1).ToArray();
    }

    /// <summary>What becomes of the views of a picture: rows for the decoder, view by
    /// view.</summary>
    public List<float[]> Embed(string projector, Picture picture, int width)
    {
        var parameters = MtmdContextParams.Default();
        (parameters.UseGpu, parameters.NThreads, parameters.Warmup) = (false, 1, false);
        using var model = MtmdWeights.LoadFromFile(projector, _weights, parameters);
        using SafeMtmdEmbed media = SafeMtmdEmbed.FromRgbBytes(
            (uint)picture.Width, (uint)picture.Height, picture.Rgb)!;
        SafeMtmdEmbed[] list = [media];
        Assert.That(
            model.Tokenize("<__media__>What?", false, true, list, out var chunks), Is.Zero);
        var encode = (delegate* unmanaged[Cdecl]<nint, nint, int>)NativeLibrary.GetExport(
            s_pictures.Value, "mtmd_encode_chunk");
        var result = (delegate* unmanaged[Cdecl]<nint, float*>)NativeLibrary.GetExport(
            s_pictures.Value, "mtmd_get_output_embd");
        nint handle = model.NativeHandle.DangerousGetHandle();
        var views = new List<float[]>();
        using (chunks)
        {
            foreach (SafeMtmdInputChunk chunk in chunks!.Enumerate())
            {
                if ($"{chunk.Type}" != "Image") continue;
                Assert.That(encode(handle, chunk.NativePtr), Is.Zero);
                views.Add(new Span<float>(result(handle), (int)chunk.NTokens * width).ToArray());
            }
        }

        return views;
    }

    public void Dispose()
    {
        _context.Dispose();
        _weights.Dispose();
    }

    private static nint Load()
    {
        if (!OperatingSystem.IsLinux()
            || RuntimeInformation.ProcessArchitecture != Architecture.X64)
            Assert.Ignore("llama.cpp is loaded on Linux, x64, only");
        string package = typeof(LlamaCpp).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
            .First(a => a.Key == "LlamaCpp").Value!;
        string folder = Path.Combine(package, "LLamaSharpRuntimes", "linux-x64", "native",
            Avx2.IsSupported ? "avx2" : "noavx");
        string pictures = Path.Combine(folder, "libmtmd.so");
        NativeLibraryConfig.All.WithLogCallback((_, _) => { });
        NativeLibraryConfig.All.WithLibrary(Path.Combine(folder, "libllama.so"), pictures);
        nint library = NativeLibrary.Load(pictures);
        foreach (string log in (string[])["mtmd_log_set", "mtmd_helper_log_set"])
            ((delegate* unmanaged[Cdecl]<nint, nint, void>)NativeLibrary.GetExport(library, log))(
                (nint)(delegate* unmanaged[Cdecl]<int, nint, nint, void>)&Mute, 0);
        return library;
    }

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void Mute(int level, nint text, nint data)
    {
    }
}
