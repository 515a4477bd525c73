using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-V 4.7: MiniCPM-V 4.6 whose tokens have places on the canvases of pictures
/// (<see cref="CanvasTokens"/>).
/// </summary>
internal sealed class MiniCpmV47() : NativeFamily(
    "MiniCPM-V-4_7", "minicpmv4_7", "MiniCPMV4_7ForConditionalGeneration")
{
    protected override bool NumbersVideos => false;

    public override ModelSpec Read(ModelConfig config)
    {
        ModelSpec spec = base.Read(config);
        return spec with
        {
            Decoder = spec.Decoder with { RopeSections = NativeConfig.RopeSections(config) },
        };
    }

    public override RowFormat Rows(ModelSpec spec)
    {
        RowFormat rows = base.Rows(spec);
        JsonValue json = ModelConfig.Open(spec.Directory).Json;
        PlaceholderTokens tokens = spec.Processor.Tokens;
        return rows with
        {
            Canvas = new CanvasTokens(
                (rows.Placeholders.UnknownId, rows.Placeholders.VideoId ?? -1),
                Id("image_start_id", tokens.ImageStart), Id("image_end_id", tokens.ImageEnd),
                Id("slice_start_id", tokens.SliceStart), Id("slice_end_id", tokens.SliceEnd),
                Id("newline_id", "\n")),
        };

        // The class goes on without them, with places that are wrong.
        int Id(string key, string token)
        {
            int[] ids = rows.Tokenizer.Encode(token);
            string expected = $"{ids[0]}, the tokenizer's {Messages.Quote(token)}";
            if (json.Find(key) is not { } id)
                throw json.Error($"has no {key}, without which positions of pictures are "
                    + $"wrong: set it to {expected}");
            return ids.Length == 1 && id.Int() == ids[0] ? ids[0] : throw id.Expected(expected);
        }
    }
}
