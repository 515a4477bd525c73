using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-OCR 1.0: MiniCPM-V 4.6 without the merger in the vision tower, with a head that is the
/// embedding, with pictures resized as torchvision does and small ones enlarged only where their
/// text asks for it (<see cref="SmallPictures"/>).
/// </summary>
internal sealed class MiniCpmOcr() : NativeFamily(
    "MiniCPM-OCR", "minicpm_ocr", "MiniCPMOcrForConditionalGeneration")
{
    protected override NativeDefaults Defaults { get; } = new(
        "4x", TiesHead: true, ChoosesSmall: true);

    public override GgufNames Gguf => new("qwen35", "qwen35", Projector: null);

    public override RowFormat Rows(ModelSpec spec) => base.Rows(spec) with { NarrowResize = true };
}
