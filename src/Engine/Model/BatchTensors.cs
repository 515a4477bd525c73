using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// What every model needs of the batch that is on the device; parts of the model bring what is
/// their own besides (<see cref="IBatchInput"/>).
/// </summary>
public sealed class BatchTensors : IBatchInput
{
    public int Pictures { get; private set; }

    /// <summary>I32[tokens].</summary>
    public Tensor Tokens { get; private set; }

    /// <summary>I32[labels]: rows of the tokens that are supervised.</summary>
    public Tensor LabelRows { get; private set; }

    /// <summary>I32[labels].</summary>
    public Tensor Targets { get; private set; }

    /// <summary>I32[slots]: tokens that are picture features.</summary>
    public Tensor Slots { get; private set; }

    /// <summary>I32[slots], only when the slots do not simply take all features in order.</summary>
    public Tensor FeatureIds { get; private set; }

    /// <summary>I32[slots]: tokens that are sound features; none where there is no
    /// sound.</summary>
    public Tensor SoundSlots { get; private set; }

    /// <summary>I32[pictures + 1], in patches.</summary>
    public Tensor PictureStarts { get; private set; }

    public long Count(Batch batch) => (long)batch.Tokens.Count + batch.LabelRows.Count
        + batch.Targets.Count + batch.Slots.Count + batch.SlotFeatures.Count
        + batch.SoundSlots.Count
        + batch.PictureStarts.Count;

    public void Load(Batch batch, BatchUpload upload)
    {
        Pictures = batch.Grids.Count / 2;
        Tokens = upload.Ints(batch.Tokens.Span, "tokens");
        LabelRows = upload.Ints(batch.LabelRows.Span, "label rows");
        Targets = upload.Ints(batch.Targets.Span, "targets");
        Slots = upload.Ints(batch.Slots.Span, "slots");
        SoundSlots = batch.SoundSlots.Count > 0
            ? upload.Ints(batch.SoundSlots.Span, "sound slots") : Tensor.None;
        FeatureIds = Tensor.None;
        PictureStarts = Pictures > 0
            ? upload.Ints(batch.PictureStarts.Span, "picture starts") : Tensor.None;
        bool allInOrder = batch.SlotFeatures.Count == batch.Features;
        for (int i = 0; i < batch.SlotFeatures.Count && allInOrder; i++)
            allInOrder = batch.SlotFeatures[i] == i;
        if (!allInOrder) FeatureIds = upload.Ints(batch.SlotFeatures.Span, "feature ids");
    }
}
