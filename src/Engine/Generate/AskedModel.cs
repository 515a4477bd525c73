using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// A model that is opened to be asked, with or without an adapter, which can be turned off: its B
/// become zero, and what it has trained whole becomes the model's own again. So one model serves
/// both, at no cost but the adapter's size.
/// </summary>
public sealed class AskedModel : IDisposable
{
    private readonly Checkpoint _checkpoint;
    private readonly AdapterFile? _adapter;
    private readonly IReadOnlyDictionary<string, StoredTensor> _trained;
    private readonly ParameterRanges _values;
    private readonly AdapterLayout? _layout;
    private bool _isAdapted;

    private AskedModel(
        LoadedModel model, Checkpoint checkpoint, AdapterFile? adapter,
        IReadOnlyDictionary<string, StoredTensor> trained, ParameterRanges values,
        AdapterLayout? layout)
    {
        (Model, _checkpoint, _adapter, _trained, _values, _layout) =
            (model, checkpoint, adapter, trained, values, layout);
        foreach (TunedTensor tensor in values.List)
            if (!trained.ContainsKey(tensor.Name) && checkpoint.Find(tensor.Name) is { } own)
                values.Write(tensor.Name, own.ToFloats());
        IsAdapted = adapter is not null;
    }

    public LoadedModel Model { get; }

    /// <summary>Sees to the memory of a GPU; null on the CPU, which takes it as it goes.</summary>
    public StepCounter? Counter { get; private init; }

    public RowFormat Rows => Model.Rows;

    /// <summary>The adapter's folder, or null.</summary>
    public string? Adapter => _adapter?.Directory;

    /// <summary>
    /// max_slice_nums that the adapter was trained with, where its run says so; an adapter's own
    /// files have no place for it.
    /// </summary>
    public int? TrainedSlices => Trained("max_slice_nums")?.Int(1, 1000);

    /// <summary>How videos are shown: what is not said, as the adapter was trained.</summary>
    /// <exception cref="InputException">The model's frames are not joined in that way.</exception>
    public VideoRules? Videos(TrainArguments said) => Rows.Video?.Of(said with
    {
        VideoFps = said.VideoFps ?? Trained("video_fps")?.Number(),
        VideoMaxFrames = said.VideoMaxFrames ?? Trained("video_max_frames")?.Int(1),
        VideoMaxSliceNums = said.VideoMaxSliceNums ?? Trained("video_max_slice_nums")?.Int(1),
        VideoPacking = said.VideoPacking ?? Trained("video_packing")?.Int(1),
        VideoStackFrames = said.VideoStackFrames ?? Trained("video_stack_frames")?.Int(1),
    });

    private JsonValue? Trained(string key) => Adapter is { } folder
        && TrainWriter.Beside(folder)?.Find(key) is { } value
        && value.Element.ValueKind != System.Text.Json.JsonValueKind.Null ? value : null;

    /// <summary>Whether the adapter is at work; without one it never is.</summary>
    public bool IsAdapted
    {
        get => _isAdapted;
        set
        {
            if (value == _isAdapted || _adapter is null) return;
            _isAdapted = value;
            foreach (var (name, stored) in _trained)
                _values.Write(name, value ? _layout!.Tensor(name).Own(stored.ToFloats())
                    : _checkpoint.Find(name) is { } own ? own.ToFloats()
                    : IsSecond(name) ? new float[stored.Count]
                    : _layout!.Tokens.FirstOrDefault(t => t.Name == name) is { } tokens
                        ? _checkpoint.Get(tokens.Module.Weight).RowsToFloats(tokens.Ids)
                    : _layout.Tensor(name).Own(stored.ToFloats()));
        }
    }

    // What an adapter does is a multiple of.
    private static bool IsSecond(string name) =>
        name.Contains(".lora_B.", StringComparison.Ordinal)
        || name.EndsWith(".lora_embedding_B", StringComparison.Ordinal);

    /// <param name="arguments">model_name_or_path, device, threads, bf16, fp16 and q_lora.</param>
    /// <param name="adapter">A PEFT adapter's folder, or null.</param>
    /// <param name="devices">Opens the device; null takes the machine's.</param>
    /// <param name="say">Takes a line on the choice of the device.</param>
    /// <exception cref="InputException">The model, the adapter or the device is
    /// unusable.</exception>
    public static AskedModel Open(
        TrainArguments arguments, string? adapter, DeviceSource? devices = null,
        Action<string>? say = null)
    {
        string folder = arguments.ModelNameOrPath!;
        ModelSpec spec = ModelSpec.Read(folder).Hearing(arguments.InitAudio, adapter);
        Checkpoint? checkpoint = null;
        AdapterFile? file = null;
        OpenDevice? device = null;
        try
        {
            checkpoint = Checkpoint.Open(folder);
            checkpoint.MustMatch(spec.Parameters, Families.Explain);
            file = adapter is null ? null : AdapterFile.Open(adapter, spec.Parameters);
            spec = spec.Replicated(file?.Config.LayerReplication, checkpoint);
            AdapterLayout? layout = file?.Layout(spec.Parameters);
            var trained = layout is null ? new Dictionary<string, StoredTensor>()
                : file!.Match(layout);
            file?.MustBeOn(checkpoint);
            device = (devices ?? DeviceSource.Default).Open(arguments, say);
            // On the CPU activations are F32 in any case, and weights stay as they are stored.
            DType storage = arguments.Fp16 ? DType.F16
                : arguments.Bf16 && device.Device is CudaDevice ? DType.BF16 : DType.F32;
            foreach (StoredTensor tensor in checkpoint.Tensors) tensor.MustBeFinite(storage);
            foreach (StoredTensor tensor in trained.Values) tensor.MustBeFinite(DType.F32);
            var whole = layout?.Saved.Concat(layout.Biases).Select(t => t.Name).ToHashSet();
            var values = new ParameterRanges(device.Device,
                [.. (layout?.Tensors ?? []).Select(t => new TunedTensor(t.Name, t.OwnShape,
                    whole!.Contains(t.Name) ? storage : DType.F32, Decays: false))],
                learns: false);
            var options = new LoadOptions
            {
                Trainables = values,
                Adapters = file is null ? Adapters.None : Adapters.Of(file.Config, layout!),
                Kind = new QuantisedKind(
                    spec.Parameters, storage, Quantisation.Of(arguments), checkpoint),
            };
            LoadedModel model = LoadedModel.Load(device, spec, checkpoint, storage, options);
            return new AskedModel(model, checkpoint, file, trained, values, layout)
            {
                Counter = device.Device is not CudaDevice gpu ? null : new StepCounter(gpu, spec,
                    name => ModelWeights.StoredAs(checkpoint.Get(name).Type, storage), options),
            };
        }
        catch
        {
            device?.Dispose();
            file?.Dispose();
            checkpoint?.Dispose();
            throw;
        }
    }

    public void Dispose()
    {
        Counter?.Dispose();
        Model.Dispose();
        _adapter?.Dispose();
        _checkpoint.Dispose();
    }
}
